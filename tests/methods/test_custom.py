"""A user's own method, exactly as docs/extending.md tells it."""

import os
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from kd import artifacts, build
from kd.component import ConfigError, component, load_object, own_sources
from kd.ensemble import Ensemble
from kd.methods import KD, CustomMethod, Labels, Learner, Members, Method, Shown, label_probs
from kd.methods.trust import Confidence, Correctness, Drop, Entropy, MinNorm, Unbiased
from kd.models import CustomModel, PlainCNN
from kd.roles import Role
from kd.train import fit
from kd.train.targets import table_record
from kd.trial import try_learners
from tests.checks_methods import check_method
from tests.learners import CLASSES, Memory, network, pictures, recipe
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


def test_the_pages_method_with_parts_of_its_own_is_stopped_and_goes_on(project):
    (project / "mine/centred.py").write_text(block("# mine/centred.py"))
    method = CustomMethod(path="mine.centred:Centred", args={"width": 4}).resolved()
    teacher = Ensemble((network(5),), (1.0,))
    tried(CustomMethod(path="mine.centred:Centred"))

    def trained(checkpoint):
        learner = method.learner(network(0), [], teacher.described())
        given = {"seed": 0, "num_classes": CLASSES, "method": method, "ensemble": teacher}
        return fit(learner, pictures(), recipe(checkpoint_steps=1), checkpoint=checkpoint, **given)

    whole, _ = trained(None)
    stopped = Memory(stop_after=7)
    with pytest.raises(KeyboardInterrupt):
        trained(stopped)
    assert weights_of(trained(stopped)[0]) == weights_of(whole)
    assert whole.centres_CW.abs().sum() > 0
    sys.modules.pop("mine.centred")


def test_the_pages_library_calls_train_a_student():
    made = {}
    exec(block("def distilled("), made)
    exec(block("def loss_of("), made)
    images = pictures()
    plain = {"pixels": images.pixels_NHWC, "labels": images.labels_N}
    teachers = [network(1), network(2)]
    student, weights, accuracy = made["distilled"](plain, plain, teachers, network(3))
    assert set(weights) == {"teacher 0", "teacher 1"}
    assert 0 <= accuracy <= 1
    shown = images.batch(torch.arange(8))
    said_KBC = torch.stack([each(shown) for each in teachers])
    given = (student(shown), said_KBC, weights.values(), images.labels_N[:8])
    method, members = KD(), Members(tuple(weights), tuple(weights.values()))
    rows_BR = method.reduction(members)(said_KBC, given[3])
    wanted = method.loss(Shown(given[0], label_probs(given[3], CLASSES), rows_BR, members))
    torch.testing.assert_close(made["loss_of"](*given), wanted)


@pytest.mark.parametrize("page", ["extending", "data"])
def test_what_the_pages_put_into_params_survives_an_experiment_of_dvcs(tmp_path, page):
    """`dvc exp run -S` writes the file anew, as `modify_yaml` does."""
    from dvc.utils.serialize import modify_yaml

    text = (PROJECT / f"docs/{page}.md").read_text()
    blocks = [each for each in re.findall(r"```yaml\n(.*?)```", text, re.S) if "custom" in each]
    assert blocks
    for number, each in enumerate(blocks):
        file = tmp_path / f"{number}.yaml"
        file.write_text(each)
        before = build.read_yaml(file)
        with modify_yaml(str(file)) as raw:
            raw["seed"] = 1
        assert build.read_yaml(file) == {**before, "seed": 1}


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
    method = build.build(
        Method,
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
        (
            SOFT,
            "return logits_BC.detach().sum(dim=1)",
            r"Mine\.soft .* a loss without a gradient; .*",
        ),
        (SOFT, "return logits_BC.sum(dim=1) / 0", r"Mine\.loss is -?(inf|nan) on random .*"),
        (
            SOFT,
            "return (0 * logits_BC).sum(dim=1).sqrt()",
            r"the gradient of Mine\.loss .* finite.*",
        ),
        (
            LOSS,
            "return 0 * shown.logits_BC.sum()",
            r"Mine\.loss gives no parameter .* a gradient .*",
        ),
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


def tried(method, num_classes=3, num_peers=0, model=None):
    """Try a student that learns by the method, and its peers."""
    model = model or PlainCNN(depth=2, width=0.25)
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


class Bare(nn.Module):
    """Holds the student, but is no Learner."""

    def __init__(self, student):
        super().__init__()
        self.student = student


class Centred(Learner):
    """Keeps a mean of the logits, in a buffer or, wrongly, beside it; and one more layer."""

    def __init__(self, student, buffer=True, listed=False):
        super().__init__(student)
        layer = nn.Linear(3, 3)
        self.layers = [layer] if listed else nn.ModuleList([layer])
        if buffer:
            self.register_buffer("mean_C", torch.zeros(3))
        else:
            self.mean_C = torch.zeros(3)

    def answer(self, images):
        logits_BC = self.student(images)
        also = {"centred_BC": logits_BC - self.mean_C, "mapped_BC": self.layers[0](logits_BC)}
        self.mean_C = 0.9 * self.mean_C + 0.1 * logits_BC.detach().mean(dim=0)
        return logits_BC, also


class Centring(Labels):
    """Learns from what its learner says."""

    def __init__(self, make=Centred, **given):
        object.__setattr__(self, "made", partial(make, **given))

    def learner(self, student, peers, members=None):
        return self.made(student)

    def loss(self, shown):
        return shown.also["centred_BC"].square().mean() + shown.also["mapped_BC"].square().mean()


class Beside(nn.Module):
    """A network that keeps a mean of its inputs, in a buffer or, wrongly, beside it."""

    def __init__(self, num_classes, buffer=True):
        super().__init__()
        self.linear = nn.Linear(64, num_classes)
        if buffer:
            self.register_buffer("mean", torch.zeros(64))
        else:
            self.mean = torch.zeros(64)

    def forward(self, images):
        rows = images.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * rows.detach().mean(dim=0)
        return self.linear(rows - self.mean)


HERE = "tests.methods.test_custom"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, None),
        ({"make": Bare}, "Centring.learner returned a Bare; it must return the student, or a kd"),
        ({"make": lambda student: None}, "returned a NoneType; it must return the student"),
        ({"buffer": False}, "a Centred with .* other centred_BC in training mode, .*register_buf"),
        ({"listed": True}, r"gives other mapped_BC in training mode, .*nn\.ModuleList for lists"),
    ],
)
def test_a_learner_that_no_checkpoint_would_hold_is_refused(args, said):
    method = CustomMethod(path=f"{HERE}:Centring", args=args)
    with pytest.raises(ConfigError, match=f"^student: .*{said}") if said else nullcontext():
        tried(method)


@pytest.mark.parametrize("buffer", [True, False])
def test_a_network_that_no_file_would_hold_is_refused(buffer):
    model = CustomModel(path=f"{HERE}:Beside", args={"buffer": buffer})
    said = "^student: a Beside with .* gives other logits in evaluation mode"
    with nullcontext() if buffer else pytest.raises(ConfigError, match=said):
        tried(KD(), model=model)


class Shaken(nn.Module):
    """A network that draws from Python's own generator in training."""

    def __init__(self, num_classes):
        super().__init__()
        self.linear = nn.Linear(64, num_classes)

    def forward(self, images):
        return self.linear(images.flatten(1)) * (random.random() if self.training else 1.0)


def test_a_network_may_draw_numbers_from_elsewhere():
    tried(KD(), model=CustomModel(path=f"{HERE}:Shaken"))


def test_trust_is_an_option_of_a_users_method_in_params(project):
    def made(trust):
        return CustomMethod(path="mine.methods:Reverse", args={"trust": trust})

    assert made({"kind": "drop", "keep": 0.5}).resolved().trust == Drop(keep=0.5)
    tried(made({"kind": "entropy"}))
    for trust, said in (
        ({"kind": "entrop"}, "trust.kind is 'entrop'; it must be one of correctness, confidence"),
        ({"kind": "drop", "share": 0.5}, "trust: .* unexpected keyword argument 'share'"),
    ):
        with pytest.raises(ConfigError, match=said):
            made(trust).resolved()


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
    member = nn.Sequential(load_object("kd_tests_own_code:Net")())  # also where it is a part
    before = own_sources(asdict(role)), table_record(member, pictures(), recipe(), None)["source"]
    file.write_text(file.read_text() + "# edited\n")
    after = own_sources(asdict(role)), table_record(member, pictures(), recipe(), None)["source"]
    assert len(before[0]) == len(after[0]) == 2
    assert set(before[0]).isdisjoint(after[0])
    assert before[1] != after[1]
    assert artifacts.code_digest(own=before[0]) != artifacts.code_digest(own=after[0])
