"""One network's training: what is left of it after a stop, and of the method that it was given."""

import signal
import sys
from typing import ClassVar

import numpy as np
import pytest

from kd import artifacts, manifest, params, stages
from kd.component import component
from kd.exporters import Int8, Trained
from kd.methods import DML, KD, CustomMethod, Labels, OwnMean
from kd.models import PlainCNN
from kd.qat import fine_tuned
from kd.roles import Role, learn
from kd.tracking import NullRun
from tests.learners import recipe, weights_of
from tests.test_pipeline import experiment


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A workspace that holds the embedded images."""
    folder = tmp_path_factory.mktemp("prepared")
    experiment(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stages.data(params.load(), "", NullRun())
    return folder


@pytest.fixture
def here(prepared, tmp_path, monkeypatch):
    """An empty workspace with those images."""
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "data").symlink_to(prepared / "artifacts" / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def role(**changes):
    """A network that is trained in a moment, as a teacher is."""
    given = {
        "run_name": "teacher",
        "role": "teacher",
        "model": PlainCNN(depth=2, width=0.25),
        "recipe": recipe(epochs=2, batch_size=256, checkpoint_minutes=1e9),
        "seed": 0,
    }
    return Role(**(given | changes))


class Watched(NullRun):
    """A run that sends its own process a signal at an epoch, and knows what it was told."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.stop_at = stop_at
        self.told = []

    def log_epoch(self, step, metrics):
        self.told.append(step)
        if step == self.stop_at:
            signal.raise_signal(signal.SIGINT)


def test_the_data_stages_run_is_found_by_the_data_that_it_made(tmp_path, monkeypatch):
    experiment(tmp_path)
    monkeypatch.chdir(tmp_path)

    class Tagged(NullRun):
        def log_tags(self, tags):
            self.tags = {**self.tags, **tags}

    stages.prepare_data(read := params.load(), stages.read_data(read), run := Tagged())
    assert run.tags == {"kd.data_hash": artifacts.data_record()["data_hash"]}


def test_a_students_run_can_be_compared_by_its_teachers_weights(here):
    class Final(NullRun):
        def log_final(self, metrics):
            self.final = metrics

    two = {"run_name": "assistants/two", "role": "assistant"}
    for each in (role(), role(**two)):
        learn(each, run := Final())
        assert not any(name.startswith("weight/") for name in run.final)
    student = {"run_name": "student", "role": "student", "method": KD()}
    learn(role(**student, teachers={"teacher": 0.25, "assistants/two": 0.75}), run)
    assert run.final.items() >= {"weight/teacher": 0.25, "weight/two": 0.75}.items()


def test_a_stop_in_the_third_generation_costs_nothing_of_the_two_before(here):
    born_again = role(method=KD(), generations=3)
    learn(born_again, whole := Watched())
    assert whole.told == [1, 2, 3, 4, 5, 6]
    expected = manifest.read(artifacts.folder("teacher")).sha256
    with pytest.raises(KeyboardInterrupt):
        learn(born_again, Watched(stop_at=5))
    learn(born_again, resumed := Watched())
    assert resumed.told == [6]
    assert manifest.read(artifacts.folder("teacher")).sha256 == expected
    assert not list((here / ".kd/checkpoints").rglob("*.*"))


@component
class Watching(Labels):
    """Labels alone, which notes whether each batch has images without one."""

    unlabelled: ClassVar[list[bool]] = []

    def loss(self, shown):
        self.unlabelled.append(bool((shown.label_probs_BC.sum(dim=1) == 0).any()))
        return Labels.loss(self, shown)


def test_a_second_generation_that_hears_nobody_is_shown_labelled_images_alone(here):
    learn(role(method=Watching(), generations=2), NullRun())
    assert len(Watching.unlabelled) > 0
    assert not any(Watching.unlabelled)


def test_a_users_method_is_one_object_from_its_learner_to_its_last_loss(here, monkeypatch):
    (here / "mine_learner.py").write_text(
        "from kd.methods import Labels\n\n\n"
        "class Mine(Labels):\n"
        "    seen = []\n\n"
        "    def learner(self, student, peers, members=None):\n"
        "        self.seen.append(self)\n"
        "        return student\n\n"
        "    def loss(self, shown):\n"
        "        self.seen.append(self)\n"
        "        return super().loss(shown)\n"
    )
    monkeypatch.syspath_prepend(str(here))
    learn(role(method=CustomMethod(path="mine_learner:Mine")), NullRun())
    seen = sys.modules.pop("mine_learner").Mine.seen
    assert len(seen) > 2
    assert len(set(map(id, seen))) == 1


@component
class Sharing(OwnMean):
    """OwnMean that notes which share of each batch had a label."""

    shares: ClassVar[list[float]] = []

    def loss(self, shown):
        if len(shown.logits_BC) == 256:  # not those few by which memory is foretold
            self.shares.append(float(shown.label_probs_BC.sum(dim=1).mean()))
        return super().loss(shown)


def test_whoever_learns_without_teachers_sees_the_pool_where_that_was_asked_for(here):
    """In as many steps either way, and nobody asks for it unless told to."""
    assert not OwnMean().pool
    assert not DML().pool
    seen = {}
    for pool in (False, True):
        Sharing.shares.clear()
        learn(role(method=Sharing(pool=pool)), NullRun())
        seen[pool] = Sharing.shares[:]
    num_train, num_pool = (
        len(np.load(artifacts.folder("data") / name / "labels.npy")) for name in ("train", "pool")
    )
    assert len(seen[True]) == len(seen[False])
    assert set(seen[False]) == {1.0}
    assert np.mean(seen[True]) == pytest.approx(num_train / (num_train + num_pool), abs=0.1)


@component
class Interrupted(KD):
    """KD that interrupts its own process once, in the second of five steps."""

    armed: ClassVar[bool] = False
    seen: ClassVar[list[float]] = []
    """How far the training was at each loss that a teacher has a say in."""

    def loss(self, shown):
        self.seen.append(shown.progress)
        if self.armed and shown.progress > 0:
            type(self).armed = False
            signal.raise_signal(signal.SIGINT)
        return super().loss(shown)


@pytest.fixture
def trained(here):
    """The teacher's network, as exports are given it."""
    learn(role(), NullRun())
    network, described = manifest.load(artifacts.folder("teacher"))
    given = {name: getattr(described, name) for name in ("image_size", "class_names")}
    return Trained(module=network, mean=described.mean, std=described.std, **given)


@pytest.mark.slow
def test_fine_tuning_in_int8_goes_on_to_the_same_bits_after_a_stop(here, trained, monkeypatch):
    student = role(method=Interrupted(), teachers={"teacher": 1.0})
    given = (Int8(qat_epochs=1), trained, student, "exports/phone")
    whole = fine_tuned(*given)
    monkeypatch.setattr(Interrupted, "armed", True)
    with pytest.raises(KeyboardInterrupt):
        fine_tuned(*given)
    assert list((here / ".kd/checkpoints/exports/phone").glob("*.safetensors"))
    Interrupted.seen.clear()
    resumed = fine_tuned(*given)
    assert len([each for each in Interrupted.seen if each > 0]) == 3
    assert weights_of(resumed.module) == weights_of(whole.module) != weights_of(trained.module)
    assert not list((here / ".kd/checkpoints").rglob("*.*"))


@pytest.mark.slow
def test_fine_tuning_in_int8_is_one_more_generation_of_a_born_again_student(trained):
    before = weights_of(trained.module)
    student = role(method=Interrupted(), generations=2)
    Interrupted.seen.clear()
    fine_tuned(Int8(qat_epochs=1), trained, student, "exports/phone")
    assert Interrupted.seen
    assert weights_of(trained.module) == before
