"""Update an unattended workspace: code from git's upstream branch, data from DVC's sources."""

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
    """Fetching new code or data failed; the message quotes git or DVC."""


def follow(root: Path) -> str:
    """Fast-forward the branch to its upstream, if it has one; return one line on what was done.

    dvc.lock may differ, since runs write it.  If the upstream changed it, the upstream's version
    is taken; DVC still finds results made here in its run-cache.

    Raises:
        UpdateFailedError: the upstream is unreachable, or the merge is not a fast-forward or would
            overwrite other changes here; or git refuses the clone, as it does another user's.
    """
    upstream = git.ask(root, "rev-parse", "--abbrev-ref", "@{upstream}")
    if not upstream:
        if (root / ".git").exists():
            _git(root, "rev-parse", "--git-dir")
        return "code: unchanged; its branch has no upstream"
    _git(root, "fetch", "--quiet")
    before, after = (git.ask(root, "rev-parse", each) for each in ("HEAD", upstream))
    if git.ask(root, "merge-base", before, after) == after:
        return f"code: {before[:10]}, up to date with {upstream}"
    if LOCK in git.ask(root, "diff", "--name-only", before, after).splitlines():
        if git.ask(root, "ls-files", LOCK):
            _git(root, "checkout", "--quiet", "--", LOCK)
        else:
            (root / LOCK).unlink(missing_ok=True)
    _git(root, "merge", "--quiet", "--ff-only", upstream)
    return f"code: {before[:10]} -> {after[:10]} of {upstream}"


def pull(root: Path, hear: Callable[[str], None], stop: threading.Event) -> str:
    """Update the pipeline's inputs that DVC tracks (.dvc files); return one line on what was done.

    An import is updated from its source.  Other data are pulled from DVC's default remote; without
    a remote, they stay as they are.

    Raises:
        UpdateFailedError: fetching failed, or would overwrite local changes.
        flows.child.Stopped: `stop` was set.
    """
    sources = graph.sources(root)
    if not sources:
        return "data: not tracked by DVC; the stage `data` reads them where they are"
    remote = has_remote(root)
    done = []
    for path, imported in sources.items():
        if imported or remote:
            dvc(root, ["update" if imported else "pull", path], hear, stop)
            done.append(path)
    if not done:
        return f"data: unchanged; {', '.join(sources)} could be pulled if DVC had a remote"
    return f"data: pulled {', '.join(done)}"


def push(root: Path, hear: Callable[[str], None], stop: threading.Event) -> str:
    """Push results and run-cache to DVC's default remote, if there is one, for `dvc repro --pull`.

    Raises:
        UpdateFailedError: the push failed.
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
    """Run `dvc WORDS`.

    Raises:
        UpdateFailedError: it failed; the message ends with its last lines.
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
