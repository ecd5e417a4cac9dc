"""New code from a branch's upstream, new data from DVC's: real repositories, real remotes."""

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import graph, upstream
from tests.flows.toys import FOREIGN_WARNINGS, Toy, timed

pytestmark = FOREIGN_WARNINGS


def git(root: Path, *words: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    subprocess.run(["git", *identity, *words], cwd=root, check=True, capture_output=True)


def commit(toy: Toy) -> None:
    git(toy.root, "add", "--all")
    git(toy.root, "commit", "-q", "-m", "more")


@pytest.fixture
def cloned(toy: Toy, tmp_path: Path) -> tuple[Toy, Toy]:
    """A repository with a committed run, and a clone that follows it."""
    toy.write({"one": timed("one", 0)})
    toy.path("dvc.lock").write_text("schema: '2.0'\n")
    commit(toy)
    git(tmp_path, "clone", "-q", str(toy.root), "clone")
    return toy, Toy(tmp_path / "clone")


def test_a_clone_follows_its_branch_and_gives_way_in_the_lock_file_only(
    cloned: tuple[Toy, Toy],
) -> None:
    origin, clone = cloned
    assert "up to date with origin/" in upstream.follow(clone.root)
    clone.path("dvc.lock").write_text("a run's\n")
    origin.write({"one": timed("one", 0), "two": timed("two", 0)})
    commit(origin)
    assert " -> " in upstream.follow(clone.root)
    assert clone.path("dvc.lock").read_text() == "a run's\n", "the upstream left it as it was"
    assert "two" in clone.path("dvc.yaml").read_text()
    origin.path("dvc.lock").write_text("another one\n")
    commit(origin)
    upstream.follow(clone.root)
    assert clone.path("dvc.lock").read_text() == "another one\n"

    clone.path("dvc.yaml").write_text("somebody works here\n")
    origin.write({})
    commit(origin)
    with pytest.raises(upstream.UpdateFailedError, match=r"dvc\.yaml"):
        upstream.follow(clone.root)
    assert clone.path("dvc.yaml").read_text() == "somebody works here\n"


def test_a_lock_file_that_git_does_not_know_gives_way_too(cloned: tuple[Toy, Toy]) -> None:
    origin, clone = cloned
    for here in ("a run's\n", None):  # or nothing was run here yet
        git(origin.root, "rm", "-q", "dvc.lock")
        commit(origin)
        upstream.follow(clone.root)
        if here:
            clone.path("dvc.lock").write_text(here)
        origin.path("dvc.lock").write_text("another one\n")
        commit(origin)
        upstream.follow(clone.root)
        assert clone.path("dvc.lock").read_text() == "another one\n"


def test_a_branch_that_follows_none_stays_as_it_is(toy: Toy) -> None:
    assert "has no upstream" in upstream.follow(toy.root)


def test_a_clone_that_git_refuses_is_no_branch_without_an_upstream(
    cloned: tuple[Toy, Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(upstream.UpdateFailedError, match="dubious ownership"):
        upstream.follow(cloned[1].root)


@pytest.mark.slow
def test_data_in_dvcs_care_are_pulled_and_imports_updated(toy: Toy, tmp_path: Path) -> None:
    heard: list[str] = []
    stop = threading.Event()
    toy.write({"one": timed("one", 0)})
    assert upstream.pull(toy.root, heard.append, stop).startswith("data: not tracked by DVC")
    outside = tmp_path / "outside.txt"
    outside.write_text("1")
    toy.path("pictures.txt").write_text("1")
    toy.dvc("add", "-q", "pictures.txt")
    toy.dvc("import-url", "-q", str(outside), "labels.txt")
    toy.write({"one": timed("one", 0, deps=["pictures.txt", "labels.txt"])})
    assert graph.sources(toy.root) == {"pictures.txt.dvc": False, "labels.txt.dvc": True}
    outside.write_text("2")
    assert upstream.pull(toy.root, heard.append, stop) == "data: pulled labels.txt.dvc"
    assert toy.path("labels.txt").read_text() == "2"

    assert "no remote" in upstream.push(toy.root, heard.append, stop)
    toy.dvc("remote", "add", "-q", "-d", "store", str(tmp_path / "store"))
    assert "pushed" in upstream.push(toy.root, heard.append, stop)
    toy.path("pictures.txt").unlink()
    subprocess.run(["rm", "-rf", toy.path(".dvc/cache")], check=True)
    assert "pictures.txt.dvc" in upstream.pull(toy.root, heard.append, stop)
    assert toy.path("pictures.txt").read_text() == "1"

    (tmp_path / "store").rename(tmp_path / "gone")
    toy.path("pictures.txt").unlink()
    subprocess.run(["rm", "-rf", toy.path(".dvc/cache")], check=True)
    with pytest.raises(upstream.UpdateFailedError, match=r"`dvc pull pictures\.txt\.dvc` failed"):
        upstream.pull(toy.root, heard.append, stop)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_remote_is_named_and_the_next_push_completes(
    toy: Toy, tmp_path: Path, small_disk: Path
) -> None:
    stop = threading.Event()
    toy.dvc("remote", "add", "-q", "-d", "store", str(small_disk / "store"))
    toy.write({"one": {"cmd": "head -c 300000 /dev/urandom > one.txt", "outs": ["one.txt"]}})
    toy.dvc("repro", "-q")
    with pytest.raises(upstream.UpdateFailedError, match="No space left on device"):
        upstream.push(toy.root, print, stop)
    assert toy.status() == {}
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert "pushed" in upstream.push(toy.root, print, stop)
    commit(toy)
    git(tmp_path, "clone", "-q", str(toy.root), "clone")
    clone = Toy(tmp_path / "clone")
    clone.dvc("pull", "-q")
    assert clone.path("one.txt").read_bytes() == toy.path("one.txt").read_bytes()


@pytest.mark.slow
def test_a_push_that_failed_is_made_up_by_a_run_in_which_nothing_changed(
    toy: Toy, tmp_path: Path, prefect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.retrain_flow import retrain  # after `prefect` has set its environment

    monkeypatch.setenv("KD_WARM", "0")
    (tmp_path / "store").write_text("a file where the remote's folder should be")
    toy.dvc("remote", "add", "-q", "-d", "store", str(tmp_path / "store"))
    toy.path("in.txt").write_text("what DVC finds the run by")
    toy.write({"one": timed("one", 0, deps=["in.txt"])})
    commit(toy)
    failed = retrain(str(toy.root), follow=False, return_state=True)
    assert "`dvc push --run-cache` failed" in str(failed.message)
    assert toy.status() == {}, "what was made is here"
    (tmp_path / "store").unlink()
    done = retrain(str(toy.root), follow=False, return_state=True)
    assert done.message == "nothing changed"
    noted = toy.path(".kd/retrain.run").read_text()  # by which a killed one would be closed
    assert noted == str(done.state_details.flow_run_id)
    assert "are in sync" in toy.dvc("status", "--cloud")

    git(tmp_path, "clone", "-q", str(toy.root), "clone")  # without dvc.lock, which no flow commits
    clone = Toy(tmp_path / "clone")
    assert "is cached - skipping run" in clone.dvc("repro", "--pull")
    assert clone.times("one") == toy.times("one")


@pytest.mark.slow
def test_a_remote_that_does_not_answer_is_named_and_costs_nothing_here(toy: Toy) -> None:
    toy.dvc("remote", "add", "-q", "-d", "store", "http://127.0.0.1:9/store")  # nobody listens
    toy.write({"one": timed("one", 0)})
    toy.dvc("repro", "-q")
    with pytest.raises(upstream.UpdateFailedError, match=r"127\.0\.0\.1"):
        upstream.push(toy.root, print, threading.Event())
    assert toy.status() == {}
