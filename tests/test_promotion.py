"""Who becomes champion, on a real store, also when the process that decides is killed."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kd import promotion, publish, tracking
from kd.bundle import checksums
from kd.component import ConfigError
from kd.data import Images
from kd.evaluate import predict
from kd.exporters import Onnx
from tests.bundle import toys
from tests.test_tracking import GIVEN, SOURCES

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 with SQLAlchemy 2.1, in the client that these tests look at the store with.
    "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"
)


def rights(both: int, gained: int, lost: int, neither: int = 0):
    """Which images the new and the old student predict rightly."""
    new = [True] * (both + gained) + [False] * (lost + neither)
    old = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return torch.tensor(new, dtype=torch.bool), torch.tensor(old, dtype=torch.bool)


def test_a_student_wins_by_more_than_noise_only():
    won = promotion.compared(*rights(90, 5, 0, 5), "3", 100)
    assert won.wins, "p = 1/32"
    assert won.decision.startswith("champion: accuracy 0.9500 against 0.9000 of version 3 on 100 ")
    tied = promotion.compared(*rights(90, 4, 0, 6), "3", 100)
    assert not tied.wins, "p = 1/16, though it is better"
    assert tied.decision.startswith("challenger: ")
    none = promotion.compared(*rights(0, 0, 0), "3", 100)
    assert (none.wins, none.decision.startswith("not compared")) == (False, True)


def test_a_student_that_is_no_better_seldom_wins():
    rng = np.random.default_rng(1)
    wins = 0
    for _ in range(2000):
        new_N, old_N = (torch.from_numpy(rng.random(200) < 0.9) for _ in range(2))
        wins += promotion.compared(new_N, old_N, "1", 200).wins
    assert wins / 2000 < promotion.LEVEL + 3 * (promotion.LEVEL / 2000) ** 0.5


class Workspace:
    """artifacts/ with data and one student at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (180, 8, 8, 3), dtype=np.uint8)
        self.modules = {
            seed: toys.network(root / f"networks/{seed}", seed)[0] for seed in (1, 2, 3)
        }
        self.data(train=range(120), val=range(120, 180))

    def data(self, train: range, val: range, right: int = 2, data_hash: str = "d" * 64) -> None:
        """Write the data; labels are what the network `right` predicts."""
        mean, std = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
        folder = self.root / "artifacts/data"
        half = len(train) // 2
        for name, chosen in (("train", train[:half]), ("pool", train[half:]), ("val", val)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / name / "images.npy", self.pixels[chosen.start : chosen.stop])
            np.save(folder / name / "labels.npy", np.zeros(len(chosen), np.int64))
        record = {"mean": mean, "std": std, "data_hash": data_hash, "class_names": toys.CLASSES}
        record["splits"] = {"train": {"count": 120}, "val": {"sha256": str(val), "count": 60}}
        (folder / "data.json").write_text(json.dumps(record | {"dataset": {"kind": "toys"}}))
        labels_N = predict(self.modules[right], self.images()).argmax(1).numpy()
        np.save(folder / "val/labels.npy", labels_N)

    def images(self):
        return Images.load(self.root / "artifacts/data", "val")

    def student(self, seed: int, **others) -> str:
        """Put a student in place; the SHA-256 of its weights."""
        folder = self.root / "artifacts/student"
        _, described = toys.network(folder, seed, **others)
        (folder / "metrics.json").write_text('{"val_accuracy": 0.5}')
        return described.sha256


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A repository with a store."""
    root = tmp_path_factory.mktemp("promotion")
    (root / "dvc.yaml").write_text("stages: {}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_RECORDER_IDLE", "20")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of MLflow's many dependencies
            import mlflow
        yield SimpleNamespace(root=root, mlflow=mlflow)


@pytest.fixture
def place(home, monkeypatch, request):
    """Fresh artifacts, and a name of their own in the registry."""
    name = request.node.name
    monkeypatch.chdir(home.root)
    monkeypatch.setattr(promotion, "REGISTERED_NAME", name)
    for left_over in ("artifacts", "networks"):
        shutil.rmtree(left_over, ignore_errors=True)

    def aliases(name=name):
        client = home.mlflow.MlflowClient(tracking.tracking_uri())
        found = client.get_registered_model(name).aliases
        return {alias: str(number) for alias, number in found.items()}

    def everything(name=name):
        """All that the store knows of runs, versions, models and decisions."""
        client = home.mlflow.MlflowClient(tracking.tracking_uri())
        return (
            aliases(name),
            sorted(run.info.run_id for run in client.search_runs(["1"])),
            sorted(
                (v.name, v.version, sorted(v.tags.items())) for v in client.search_model_versions()
            ),
            sorted(model.model_id for model in client.search_logged_models(["1"])),
        )

    workspace = Workspace(home.root)
    return SimpleNamespace(workspace=workspace, name=name, aliases=aliases, everything=everything)


def promote(resume: bool = False, **how) -> str:
    with tracking.run("student", **GIVEN, resume=resume) as run:
        said = promotion.promote(run, **how)
        assert run.id
    assert run.error is None
    return said


KILLED = """
import os, signal, sys
from kd import promotion, tracking
from kd.tracking import Run
promotion.REGISTERED_NAME = sys.argv[1]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
Run.promote = die  # between the registration and the alias
with tracking.run("student", params={}, tags={}) as run:
    promotion.promote(run)
"""


def test_a_better_student_takes_over_and_no_repetition_or_crash_changes_that(place):
    place.workspace.student(1)
    died = subprocess.run(
        [sys.executable, "-c", KILLED, place.name],
        env={**os.environ, "PYTHONPATH": SOURCES},
        capture_output=True,
        text=True,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert place.aliases() == {}, "registered, and nothing decided"
    assert promote() == "version 1: champion: the first of its name"
    assert place.aliases() == {"challenger": "1", "champion": "1"}

    place.workspace.student(2)
    said = promote()
    assert said.startswith("version 2: champion: accuracy 1.0000 against 0.")
    before = place.everything()
    assert before[0] == {"challenger": "2", "champion": "2"}
    promote(resume=True)
    assert place.everything() == before, "the same student again"

    place.workspace.student(1)  # comes back, as from the run-cache
    said = promote(resume=True)
    assert said.startswith("version 1: challenger: accuracy 0.")
    assert said.endswith(promotion.BEFORE)
    assert place.aliases() == {"challenger": "1", "champion": "2"}
    before = place.everything()
    assert promote(resume=True) == said
    assert place.everything() == before


def move_champion_to(name: str, number: str) -> None:
    """By the command that docs/schedules.md names."""
    lines = (Path(SOURCES) / "docs/schedules.md").read_text().splitlines()
    (line,) = (each for each in lines if "set_registered_model_alias" in each)
    _, *words = shlex.split(line.replace("kd-student", name).replace("'1'", f"'{number}'"))
    env = {**os.environ, "PYTHONPATH": SOURCES}
    subprocess.run([sys.executable, *words], env=env, check=True, capture_output=True)


def test_a_champion_that_was_taken_back_by_hand_returns_only_when_told(place):
    place.workspace.student(1)
    promote()
    place.workspace.student(2)
    won = promote()
    move_champion_to(place.name, "1")
    refused = f"{won.replace('champion', 'challenger', 1)}; {promotion.BEFORE}"
    assert promote(resume=True) == refused
    kept = place.everything()
    assert kept[0] == {"challenger": "2", "champion": "1"}
    assert promote(resume=True) == refused
    assert place.everything() == kept

    place.workspace.data(train=range(120), val=range(120, 180), right=1)
    place.workspace.student(3)  # another student competes with the one that was gone back to
    assert promote().startswith("version 3: challenger: accuracy 0.")
    place.workspace.student(1)
    assert promote() == "version 1: champion already"
    place.workspace.student(2)
    assert promote(compare=False) == (
        "version 2: champion: replaces version 1 without a comparison, as told"
    )
    assert place.aliases()["champion"] == "2"

    move_champion_to(place.name, "3")  # which never won by itself
    place.workspace.student(3)
    assert promote() == "version 3: champion: named so by hand, or before a crash"
    assert promote() == "version 3: champion already"
    move_champion_to(place.name, "1")
    place.workspace.data(train=range(120), val=range(120, 180), right=3)
    assert promote().endswith(promotion.BEFORE)
    assert place.aliases() == {"challenger": "3", "champion": "1"}


def test_images_are_known_by_their_pixels_in_every_part_of_a_split():
    pixels_NHWC = torch.arange(4 * 12, dtype=torch.uint8).reshape(4, 2, 2, 3)
    given = {"labels_N": torch.zeros(4).long(), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    whole = promotion.hashes(Images(pixels_NHWC=pixels_NHWC, **given))
    first, *others = pixels_NHWC.split([1, 2, 1])
    parts = Images(pixels_NHWC=first, beyond_NHWC=tuple(others), **given)
    assert promotion.hashes(parts).tolist() == whole.tolist()
    assert len(set(whole.tolist())) == 4


def test_on_other_images_the_champion_is_tried_on_those_that_it_has_not_learned_from(place):
    place.workspace.student(1)
    promote()
    place.workspace.data(train=range(90), val=range(90, 180), data_hash="e" * 64)
    place.workspace.student(2, data_hash="e" * 64)
    said = promote()
    assert "on those 60 of 90 validation images that it has not learned from" in said
    assert place.aliases()["champion"] == "2", said


def test_a_champion_is_shown_the_images_as_normalised_as_those_it_has_learned(place):
    mean, std = (0.1, 0.2, 0.3), (0.02, 0.5, 0.9)
    folder = Path("networks/champion")
    champion, _ = toys.network(folder, 3, mean=mean, std=std)  # whose answers depend on both
    place.workspace.student(2)
    found = promotion.tried(SimpleNamespace(number="1"), lambda _: folder)
    pixels = torch.from_numpy(place.workspace.pixels[120:180]).double() / 255
    shown = (pixels - torch.tensor(mean)) / torch.tensor(std)
    predicted = champion(shown.float().permute(0, 3, 1, 2)).argmax(1)
    right = (predicted == place.workspace.images().labels_N).double().mean()
    assert f"accuracy 1.0000 against {right:.4f} of version 1" in found.decision


@pytest.mark.parametrize(
    ("what", "value"), [("class_names", ("x", "y", "z")), ("channels", 1), ("image_size", 16)]
)
def test_a_champion_must_have_the_same_classes_and_images(tmp_path, what, value):
    _, student = toys.network(tmp_path)
    promotion.fits(student, student)
    with pytest.raises(ValueError, match=f"its {what} is"):
        promotion.fits(student, replace(student, **{what: value}))


def test_a_champion_that_cannot_be_fetched_decides_nothing(place):
    place.workspace.student(1)

    def fetch(version):
        raise tracking.TrackingError("the registry", "it does not answer")

    with pytest.raises(tracking.TrackingError, match="it does not answer"):
        promotion.tried(SimpleNamespace(number="1"), fetch)


def test_who_becomes_champion_meanwhile_is_competed_with_too(home, place, monkeypatch):
    for seed in (1, 2):
        place.workspace.student(seed)
        promote(compare=False)
    client = home.mlflow.MlflowClient(tracking.tracking_uri())
    judge, met = promotion.judge, []

    def meanwhile(challenger, champion, *rest, **how):
        met.append(champion.number)
        if len(met) < 4:
            other = {"1": "2", "2": "1"}[champion.number]
            client.set_registered_model_alias(place.name, "champion", other)
        return judge(challenger, champion, *rest, **how)

    monkeypatch.setattr(promotion, "judge", meanwhile)
    monkeypatch.setattr(promotion, "TRIES", 2)
    place.workspace.student(3)
    with pytest.raises(tracking.TrackingError, match="the champion changed 2 times meanwhile"):
        promote()
    assert place.aliases() == {"challenger": "2", "champion": "2"}
    assert "of version 1 on 60" in promote()
    assert met == ["2", "1", "2", "1"]


def test_a_champion_that_answers_another_question_stays_and_the_remedy_is_named(place):
    place.workspace.student(1, class_names=("x", "y", "z"))
    promote()
    place.workspace.student(2)
    said = promote()
    assert "not compared: version 1 cannot be run on these images (its class_names" in said
    assert said.endswith("to replace it, run `kd promote --replace`")
    assert place.aliases() == {"challenger": "2", "champion": "1"}
    replaced = "champion: replaces version 1 without a comparison, as told"
    assert promote(compare=False) == f"version 2: {replaced}"
    assert place.aliases() == {"challenger": "2", "champion": "2"}
    versions = {number: dict(tags) for _, number, tags in place.everything()[2] if _ == place.name}
    assert versions[2]["kd.decision"] == replaced
    assert promote(compare=False) == promote() == "version 2: champion already"


@pytest.mark.parametrize("model", [{"kind": "gone"}, {"kind": "plain_cnn", "depth": 2, "gone": 1}])
def test_a_champion_whose_model_this_code_no_longer_has_stays(place, model):
    place.workspace.student(1, model=model)
    promote()
    place.workspace.student(2)
    said = promote()
    assert "not compared: version 1 cannot be run on these images (student has the model" in said
    assert place.aliases() == {"challenger": "2", "champion": "1"}


def test_a_challenger_that_cannot_be_run_is_not_taken_for_the_champions_fault(place):
    place.workspace.student(2)
    promote()
    place.workspace.student(1)
    promote()
    place.workspace.student(1, model={"kind": "gone"})
    before = place.everything()
    with (
        tracking.run("student", **GIVEN, resume=True) as run,
        pytest.raises(ConfigError, match="student has the model"),
    ):
        promotion.promote(run)
    assert place.everything() == before, "its decision, too"


def test_exports_that_were_lost_are_logged_by_the_next_promotion_and_published(place):
    public = place.workspace.root / "public"
    url = str(public)
    one = toys.bundled(place.workspace.root / "artifacts", Onnx())
    place.workspace.student(0)
    with tracking.run("student", **GIVEN) as run:
        promotion.promote(run)
        said = publish.champion(run, place.name, url)
    assert said == f"published version 1 at {url}: onnx"
    pointer = json.loads((public / "champion.json").read_text())
    assert pointer["sha256"] == one.student.sha256
    bundle = public / pointer["exports"]["onnx"]
    assert checksums.check(bundle) == checksums.check(one.folder)

    before = {path: path.stat().st_mtime_ns for path in public.rglob("*")}
    with tracking.run("student", **GIVEN, resume=True) as run:
        promotion.promote(run)
        assert publish.champion(run, place.name, url) == f"version 1 is published at {url} already"
    assert before == {path: path.stat().st_mtime_ns for path in public.rglob("*")}

    (bundle / checksums.SUMS).unlink()  # as a copy that was cut short leaves it
    with tracking.run("student", **GIVEN, resume=True) as run:
        assert publish.champion(run, place.name, url) == said
    assert checksums.check(bundle) == checksums.check(one.folder)


def test_a_bundle_is_there_once_it_is_complete_and_a_damaged_one_never(tmp_path, monkeypatch):
    made = toys.bundled(tmp_path / "artifacts", Onnx()).folder
    place = publish.Place(f"{tmp_path}/public/")
    whole, copied = place.files.put_file, []

    def cut_short(source, target):
        if copied:
            raise OSError("the disk is full")
        copied.append(target)
        whole(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(place.files, "put_file", cut_short)
        with pytest.raises(OSError, match="the disk is full"):
            place.add(made)
    name = Path(copied[0]).parent.name
    assert not place.holds({"exports": {"onnx": name}})
    assert place.add(made) == name
    assert place.holds({"exports": {"onnx": name}})
    assert not place.holds({"exports": {"onnx": name, "executorch": "away"}})
    before = set(tmp_path.glob("public/*"))
    (made / "labels.txt").write_text("altered")
    with pytest.raises(ConfigError, match=r"labels\.txt does not match"):
        place.add(made)
    assert set(tmp_path.glob("public/*")) == before


def test_without_a_student_the_stage_to_run_is_named(place):
    with (
        tracking.run("student", **GIVEN) as run,
        pytest.raises(ConfigError, match="dvc repro student"),
    ):
        promotion.promote(run)


def test_the_command_promotes_publishes_and_does_no_harm_when_repeated(place):
    root = place.workspace.root
    toys.bundled(root / "artifacts", Onnx())
    place.workspace.student(0)
    given = (Path(SOURCES) / "params.yaml").read_text()
    (root / "params.yaml").write_text(given)

    def kd_promote(*more):
        done = subprocess.run(
            [sys.executable, "-m", "kd", "promote", "--publish", "shop", *more],
            env={**os.environ, "PYTHONPATH": SOURCES},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    assert kd_promote() == [
        "version 1: champion: the first of its name",
        "published version 1 at shop: onnx",
    ]
    before = place.everything("kd-student")
    assert before[0] == {"challenger": "1", "champion": "1"}
    assert kd_promote()[1] == "version 1 is published at shop already"
    assert place.everything("kd-student") == before

    place.workspace.student(1)
    assert kd_promote("--replace") == [
        "version 2: champion: replaces version 1 without a comparison, as told",
        "nothing published at shop: the champion has no exports yet",
    ]

    (root / "params.yaml").write_text(given.replace("tracking: true", "tracking: false"))
    assert "there is no registry to promote in" in kd_promote()[0]
