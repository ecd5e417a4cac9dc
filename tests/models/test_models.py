"""The battery over every member of the union."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from kd.build import build
from kd.models import CifarResNet, CustomModel, Model, PlainCNN, TorchvisionModel
from tests.checks_models import check_model

EXAMPLES: list[tuple[Model, int, int]] = [  # model, channels, image size
    (PlainCNN(depth=2), 1, 16),
    (PlainCNN(depth=6, table="cifar100", width=0.25), 3, 28),
    (PlainCNN(depth=10, width=0.25), 1, 16),
    (CifarResNet(depth=8), 3, 32),
    (CifarResNet(depth=20), 1, 15),
    (TorchvisionModel(name="mobilenet_v3_small"), 1, 32),
    (CustomModel(path="tests.models.toys:Tiny", args={"width": 5}), 3, 9),
]


@pytest.mark.parametrize(
    ("model", "channels", "image_size"), EXAMPLES, ids=lambda value: getattr(value, "kind", value)
)
def test_every_model_passes_the_battery(model: Model, channels: int, image_size: int) -> None:
    check_model(model, channels, image_size)


def test_every_member_of_the_union_has_an_example() -> None:
    assert {type(model) for model, _, _ in EXAMPLES} == set(get_args(Model))


PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text()


def test_the_page_has_a_row_for_every_kind_that_names_all_of_its_keys() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", PAGE, re.M))
    kinds = {get_args(get_type_hints(each)["kind"])[0]: each for each in get_args(Model)}
    assert rows.keys() == kinds.keys()
    for kind, row in rows.items():
        keys = {each.name for each in fields(kinds[kind])} - {"kind"}
        assert keys <= set(re.findall(r"`(\w+)`", row)), kind


def test_the_pages_examples_are_read_as_one_of_each_kind() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    raw = yaml.safe_load(block)
    sections = [raw["teacher"], *raw["assistants"].values(), raw["student"]]
    models = [build(Model, each["model"], "model") for each in sections]
    assert {type(each) for each in models} == set(get_args(Model))
    for each in models:
        if isinstance(each, TorchvisionModel):
            each.check()
