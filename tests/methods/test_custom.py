"""A user's own method, exactly as docs/extending.md tells it."""

import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest
from dvc.utils.serialize import modify_yaml

from kd import artifacts, params
from kd.component import ConfigError, component, load_object, own_sources
from kd.methods import KD, CustomMethod, Method
from kd.methods.trust import Confidence, Correctness, Drop, Entropy, MinNorm, Unbiased
from kd.models import CustomModel, PlainCNN
from kd.roles import Role, try_learners
from kd.train.targets import table_record
from tests.checks_methods import check_method
from tests.learners import pictures, recipe
from tests.methods.test_training import taught, weights_of

PROJECT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (PROJECT / "docs/extending.md").read_text(), re.S)


def block(words):
    """The one block of the page that contains these words."""
    (found,) = [each for each in BLOCKS if words in each]
    return found


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of a user's that holds the page's method."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/methods.py").write_text(block("# mine/methods.py"))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("mine", "mine.methods"):
        sys.modules.pop(name, None)


def test_the_battery_of_the_page_runs_in_a_users_project(project):
    (project / "test_mine.py").write_text(block("check_method(Reverse())"))
    paths = os.pathsep.join([str(project), str(PROJECT)])
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        timeout=120,
    )


@pytest.mark.parametrize("page", ["extending", "data"])
def test_what_the_pages_put_into_params_survives_an_experiment_of_dvcs(tmp_path, page):
    """`dvc exp run -S` writes the file anew, as `modify_yaml` does."""
    text = (PROJECT / f"docs/{page}.md").read_text()
    blocks = [each for each in re.findall(r"```yaml\n(.*?)```", text, re.S) if "custom" in each]
    assert blocks
    for number, each in enumerate(blocks):
        file = tmp_path / f"{number}.yaml"
        file.write_text(each)
        before = params.read_yaml(file)
        with modify_yaml(str(file)) as raw:
            raw["seed"] = 1
        assert params.read_yaml(file) == {**before, "seed": 1}


@component
class Fragile(KD):
    """Overflows where a network is very sure."""

    def loss(self, shown):
        return super().loss(shown) + 0 * shown.logits_BC.float().pow(20).sum()


@component
class Drifting(KD):
    """Adds its loss up over the classes."""

    def soft(self, logits_BC, soft_log_probs_BC, temperature, shown):
        soft_B = super().soft(logits_BC, soft_log_probs_BC, temperature, shown)
        return soft_B * logits_BC.shape[1]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            Fragile(),
            "^it must hold that extreme logits stay finite, but the loss is nan$",
        ),
        (
            Drifting(),
            r"^it must hold that the number of classes does not set the scale .*, but it is",
        ),
    ],
)
def test_the_battery_says_what_is_required(method, said):
    with pytest.raises(AssertionError, match=said):
        check_method(method)


def test_params_name_it_and_a_student_learns_by_it(project):
    method = params.build(
        params.Method,
        {"kind": "custom", "path": "mine.methods:Reverse", "args": {"alpha": 1.0}},
        "",
    )
    by_name, _ = taught(method)
    from mine.methods import Reverse

    itself, _ = taught(Reverse(alpha=1.0))
    assert weights_of(by_name) == weights_of(itself)


@pytest.mark.parametrize(
    ("path", "args", "said"),
    [
        ("mine.methods:Revers", {}, "has no 'Revers'"),
        ("mine.methods:Reverse", {"alfa": 1}, "cannot be called with"),
        ("builtins:dict", {}, "returned a dict; it must be a kd.methods.Learning"),
    ],
)
def test_what_is_no_method_is_refused(project, path, args, said):
    with pytest.raises(ConfigError, match=said):
        CustomMethod(path=path, args=args).resolved()


SOFT = """from kd.methods import KD, Labels
from torch import nn


class Mine(KD):
    def soft(self, logits_BC, soft_log_probs_BC, temperature, shown):
        {}
"""
LOSS = SOFT.replace("Mine(KD)", "Mine(Labels)").replace(
    "soft(self, logits_BC, soft_log_probs_BC, temperature, shown)", "loss(self, shown)"
)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize(
    ("text", "body", "said"),
    [
        (SOFT, "return logits_BC.sum()", r"Mine\.soft returned \(\) .*of shape \([23],\)$"),
        (SOFT, "return logits_BC", r"Mine\.soft returned \([23], \d+\) .*must return a loss for"),
        (SOFT, "return logits_BC[0]", r"Mine\.soft returned \(\d+,\) .*must return a loss for"),
        (SOFT, "pass", r"Mine\.soft returned NoneType .*must return a loss for each image"),
        (SOFT, "return shown.logits", r"AttributeError in .*own_code\.py, line 7: 'Shown' .*"),
        (
            SOFT,
            "return nn.Linear(99, 1)(logits_BC)",
            r"RuntimeError in .*own_code\.py, line 7: .*",
        ),
        (LOSS, "return shown.logits_BC.sum(dim=1)", r"Mine\.loss returned \([23],\); .*"),
        (LOSS, "return shown.logits_BC.detach().sum()", r"Mine\.loss .*\(\) without a gradient.*"),
    ],
)
def test_what_has_no_loss_is_found_before_anything_learns(
    tmp_path, monkeypatch, text, body, said, num_classes
):
    (tmp_path / "kd_tests_own_code.py").write_text(text.format(body))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kd_tests_own_code", raising=False)
    method = CustomMethod(path="kd_tests_own_code:Mine")
    try:
        with pytest.raises(ConfigError, match=f"^student: {said}"):
            tried(method, num_classes)
    finally:
        sys.modules.pop("kd_tests_own_code", None)


def tried(method, num_classes, num_peers=0):
    """Try a student that learns by the method, and its peers."""
    model = PlainCNN(depth=2, width=0.25)
    peers = {f"peer{k}": model for k in range(num_peers)}
    shape = {"channels": 1, "image_size": 8, "num_classes": num_classes}
    try_learners({"student": (model, method, peers)}, **shape)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_what_can_learn_is_let_through(num_classes):
    trusts = [Correctness(), Confidence(), Entropy(), MinNorm(), Unbiased(biased="large"), Drop()]
    for method in (each() for each in get_args(Method) if each is not CustomMethod):
        tried(method, num_classes, num_peers=method.num_peers[min(1, len(method.num_peers) - 1)])
    for trust in trusts:
        tried(KD(trust=trust, standardize=num_classes > 2), num_classes)


def test_what_a_users_code_raises_as_it_is_made_is_told_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "kd_tests_raising.py").write_text("def mine():\n    return {}['no']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"KeyError in .*raising\.py, line 2: 'no'\)$"):
        CustomMethod(path="kd_tests_raising:mine").check()


def test_what_is_begun_with_a_users_code_is_not_gone_on_with_once_it_is_edited(
    tmp_path, monkeypatch
):
    """Checkpoints and tables are named by the files in which the user's own code stands."""
    file = tmp_path / "kd_tests_own_code.py"
    file.write_text(
        "from kd.methods import KD\nfrom torch import nn\n\n\n"
        "class Mine(KD):\n    pass\n\n\nclass Net(nn.Flatten):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    role = Role(
        run_name="student",
        role="student",
        model=CustomModel(path="kd_tests_own_code:Net"),
        recipe=recipe(),
        seed=0,
        method=CustomMethod(path="kd_tests_own_code:Mine"),
    )
    member = load_object("kd_tests_own_code:Net")()
    before = own_sources(asdict(role)), table_record(member, pictures(), recipe(), None)["source"]
    file.write_text(file.read_text() + "# edited\n")
    after = own_sources(asdict(role)), table_record(member, pictures(), recipe(), None)["source"]
    assert len(before[0]) == len(after[0]) == 2
    assert set(before[0]).isdisjoint(after[0])
    assert before[1] != after[1]
    assert artifacts.code_digest(own=before[0]) != artifacts.code_digest(own=after[0])
