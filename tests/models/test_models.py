"""The battery over every member of the union."""

from typing import get_args

import pytest

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
