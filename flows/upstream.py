"""New code and new data for a workspace that runs by itself: git's branch, and DVC's sources."""

import subprocess
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from flows import child, graph
from flows.stage import DVC, environment
from kd import git

LOCK = "dvc.lock"


class UpdateFailedError(Exception):
    """New code or data could not be had; the message says what git or DVC said."""


def follow(root: Path) -> str:
    """Bring the branch to where its upstream is, if it has one; what was done, in a line.

    dvc.lock may differ, since runs write it; where the upstream brings another one, that one is
    taken, and DVC finds what was done here in its run-cache.

    Raises:
        UpdateFailedError: the upstream cannot be reached, or other files here are in its way.
    """
    upstream = git.ask(root, "rev-parse", "--abbrev-ref", "@{upstream}")
    if not upstream:
        return "code: as it is here; its branch follows no other"
    _git(root, "fetch", "--quiet")
    before, after = (git.ask(root, "rev-parse", each) for each in ("HEAD", upstream))
    if git.ask(root, "merge-base", before, after) == after:
        return f"code: {before[:10]}, as {upstream} has it"
    if LOCK in git.ask(root, "diff", "--name-only", before, after).splitlines():
        if git.ask(root, "ls-files", LOCK):
            _git(root, "checkout", "--quiet", "--", LOCK)
        else:
            (root / LOCK).unlink(missing_ok=True)
    _git(root, "merge", "--quiet", "--ff-only", upstream)
    return f"code: {before[:10]} -> {after[:10]} of {upstream}"


def pull(root: Path, hear: Callable[[str], None], stop: threading.Event) -> str:
    """Bring what the pipeline reads and DVC keeps track of (.dvc files); what was done, in a line.

    An import is updated from where it was imported.  Other data come from DVC's default remote,
    and where there is none they are those that lie here.

    Raises:
        UpdateFailedError: it could not be had, or would overwrite what was changed here.
        flows.child.Stopped: `stop` was set.
    """
    sources = graph.sources(root)
    if not sources:
        return "data: none in DVC's care; the stage `data` reads them where they are"
    remote = has_remote(root)
    done = []
    for path, imported in sources.items():
        if imported or remote:
            dvc(root, ["update" if imported else "pull", path], hear, stop)
            done.append(path)
    if not done:
        return f"data: as they are here; {', '.join(sources)} could be pulled if DVC had a remote"
    return f"data: pulled {', '.join(done)}"


def push(root: Path, hear: Callable[[str], None], stop: threading.Event) -> str:
    """Send results and run-cache to DVC's default remote, if there is one, for `dvc repro --pull`.

    Raises:
        UpdateFailedError: the remote does not take them.
        flows.child.Stopped: `stop` was set.
    """
    if not has_remote(root):
        return "results: kept here; DVC has no remote"
    dvc(root, ["push", "--run-cache"], hear, stop)
    return "results: pushed to DVC's remote"


def has_remote(root: Path) -> bool:
    """Whether DVC has a default remote."""
    asked = subprocess.run(
        [*DVC, "config", "core.remote"], cwd=root, capture_output=True, env=environment()
    )
    return bool(asked.stdout.strip())


def dvc(root: Path, words: list[str], hear: Callable[[str], None], stop: threading.Event) -> None:
    """Run `dvc WORDS` to its good end.

    Raises:
        UpdateFailedError: it failed; the message ends with what it said.
        flows.child.Stopped: `stop` was set.
    """
    said = deque[str](maxlen=15)

    def keep(line: str) -> None:
        said.append(line)
        hear(line)

    if child.run([*DVC, *words], cwd=root, env=environment(), hear=keep, stop=stop):
        raise UpdateFailedError("\n".join([f"`dvc {' '.join(words)}` failed", *said]))


def _git(root: Path, *words: str) -> None:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise UpdateFailedError(f"`git {' '.join(words)}` failed: {done.stderr.strip()}")
