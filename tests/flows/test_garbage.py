"""What housekeeping deletes is what nothing needs, and nothing else."""

import os
import socket
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import garbage, locks
from kd import tracking
from kd.component import ConfigError
from kd.tables import TARGETS, DiskTables
from kd.tracking import contact
from tests.flows.test_upstream import commit
from tests.flows.toys import Toy


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def left(path: Path) -> None:
    """A socket whose process was killed."""
    listening(path).close()


def made(toy: Toy, text: str) -> None:
    toy.write({"one": {"cmd": f"echo {text} > one.txt", "outs": ["one.txt"]}})
    toy.dvc("repro", "-q")


def test_only_what_neither_commits_nor_the_workspace_name_goes_from_dvcs_cache(
    toy: Toy, prefect: str
) -> None:
    from flows.housekeeping_flow import clean_dvc  # after `prefect` has set its environment

    made(toy, "committed")
    commit(toy)
    made(toy, "tried")
    toy.dvc("exp", "save")
    made(toy, "forgotten")
    made(toy, "present")
    (item,) = clean_dvc.fn(toy.root, dry_run=True, keep="commits")
    assert item.size == len("forgotten\n")
    cache = toy.path(".dvc/cache/files/md5")
    before = {path for path in cache.rglob("*") if path.is_file()}
    assert len(before) == 4
    assert clean_dvc.fn(toy.root, dry_run=False, keep="commits") == [item]
    gone = before - {path for path in cache.rglob("*") if path.is_file()}
    assert [f"{path.parent.name}{path.name}" for path in gone] == [item.name]
    assert toy.status() == {}
    commit(toy)
    (item,) = garbage.unused_in_dvc(toy.root, "branches")
    assert item.size == len("committed\n")


def test_days_below_zero_are_refused_before_everything_counts_as_old(prefect: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Prefect's dependencies
        from prefect.exceptions import ParameterTypeError

        from flows.housekeeping_flow import housekeeping

    with pytest.raises(ParameterTypeError, match="days: Input should be greater than or equal"):
        housekeeping.validate_parameters({"days": -1})


def test_a_repository_that_dvc_cannot_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(garbage.GarbageError, match="dvc gc"):
        garbage.unused_in_dvc(tmp_path, "commits")


@pytest.mark.usefixtures("prefect")
def test_checkpoints_that_were_used_lately_stay(tmp_path: Path) -> None:
    inside = tmp_path / ".kd/compare/digits/seed-0/.kd"
    for name in ("checkpoints/a/old", "checkpoints/a/new", "targets/old.npy", "machine/old"):
        for parent in (tmp_path / ".kd", inside):
            path = parent / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            if "old" in name:
                os.utime(path, (time.time() - 10 * 86400,) * 2)
    read_lately = tmp_path / ".kd/targets/read.npy"
    read_lately.touch()
    os.utime(read_lately, (time.time(), time.time() - 10 * 86400))
    from flows.housekeeping_flow import clean_checkpoints

    items = clean_checkpoints.fn(tmp_path, dry_run=True, days=9)
    found = {item.name for item in items}
    names = ("checkpoints/a/old", "targets/old.npy")
    prefix = ".kd/compare/digits/seed-0/.kd"
    assert found == {f"{parent}/{name}" for parent in (".kd", prefix) for name in names}
    assert garbage.old_checkpoints(tmp_path, 11) == []
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert clean_checkpoints.fn(tmp_path, dry_run=False, days=9) == items
    assert files - set(tmp_path.rglob("*")) == {tmp_path / name for name in found}


@pytest.mark.usefixtures("prefect")
def test_the_largest_are_listed_and_the_others_summed_up() -> None:
    from flows.housekeeping_flow import SHOWN, table

    items = [garbage.Item(f"{size}.npy", size) for size in range(SHOWN + 3)]
    lines = table({"DVC's cache": [], "checkpoints": items})[2:]
    assert lines[0] == f"| checkpoints | `{SHOWN + 2}.npy` | {SHOWN + 2} |"
    assert len(lines) == SHOWN + 1
    assert lines[-1] == "| checkpoints | 3 more | 3 |"
    assert len(table({"checkpoints": items[:SHOWN]})) == SHOWN + 2


def test_a_table_that_is_read_stays_where_reading_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    DiskTables().table({}, (2, 3, 4), lambda table: None)
    files = [path for path in TARGETS.iterdir() if path.suffix != ".lock"]
    for path in files:
        os.utime(path, (time.time() - 10 * 86400,) * 2)
    DiskTables().table({}, (2, 3, 4), lambda table: pytest.fail("made again"))
    for path in files:  # as with the mount option noatime
        os.utime(path, (0, path.stat().st_mtime))
    assert len(files) == 2
    assert garbage.old_checkpoints(tmp_path, 9) == []


def test_recorders_that_run_or_were_asked_lately_keep_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = contact.folder()
    left(own / "killed.sock")
    for name in ("gone.lock", "gone.log", "killed.lock", "runs.lock", "runs.log", "new.lock"):
        (own / name).touch()
        if "new" not in name:
            os.utime(own / name, (time.time() - 10 * 86400,) * 2)
    names = ("gone.log", "gone.lock", "killed.sock", "killed.lock")
    with listening(own / "runs.sock"):
        assert garbage.old_recorders(9) == [own / name for name in names]
        assert garbage.old_recorders(11) == []
        for name in ("gone.lock", "killed.lock"):
            with contact.locked(own / name):  # as each stage does
                pass
        assert garbage.old_recorders(9) == []


@pytest.mark.parametrize("needs_it", [contact.folder, locks.slots])
def test_a_temporary_folder_that_others_made_or_may_write_to_is_refused(
    needs_it: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / f"kd-{os.getuid()}"
    (tmp_path / "elsewhere").mkdir()
    own.symlink_to("elsewhere")
    with pytest.raises(PermissionError, match=own.name):
        needs_it()
    own.unlink()
    needs_it()
    own.chmod(0o777)
    with pytest.raises(PermissionError, match=own.name):
        needs_it()


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
def test_mlflows_trash_is_listed_and_emptied_but_not_what_a_version_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KD_RECORDER_IDLE", "2")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    subprocess.run(["git", "init", "-q"], check=True)
    ids = []
    for name in ("kept", "dropped", "needed"):
        with tracking.run("assistants", name, params={}, tags={}) as run:
            (tmp_path / "file").write_text("12345")
            run.log_file("file")
            ids.append(str(run.id))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow

        from kd.tracking.trash import Trash
    uri = tracking.tracking_uri()
    client = mlflow.MlflowClient(uri)
    kept, dropped, needed = ids
    client.delete_run(dropped)
    assert list(Trash(uri, 1).sizes()) == [], "it was deleted today"
    assert list(Trash(uri, 0).sizes()) == [(f"run {dropped}", 5)]
    client.delete_run(needed)
    client.create_registered_model("student")
    client.create_model_version("student", f"runs:/{needed}/file", needed)
    with pytest.raises(
        ConfigError, match=f"{needed} was deleted .* version 1 of student needs it"
    ):
        Trash(uri, 0)
    client.restore_run(needed)
    Trash(uri, 0).empty()
    assert not list(tmp_path.glob(f".kd/mlruns/**/{dropped}/**/file"))
    assert list(Trash(uri, 0).sizes()) == []
    assert {run.info.run_id for run in client.search_runs(["1"])} == {kept, needed}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # where MLflow looks for a version's model
    model = client.create_logged_model("1", "student", needed).model_id
    client.create_model_version("student", f"models:/{model}", needed)
    client.delete_logged_model(model)
    with pytest.raises(ConfigError, match=f"{model} was deleted .* version 2 of student needs it"):
        Trash(uri, 0)
    client.delete_model_version("student", "2")
    assert [name for name, _ in Trash(uri, 0).sizes()] == [f"model {model}"]
