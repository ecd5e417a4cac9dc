"""Who is champion is decided by `kd promote`, in a process of its own: flows hold no tensors.

It always runs where there is a student, and never asks what was stale: a promotion that a crash
cut short would otherwise never come.  Repeating it changes nothing.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from flows import child
from flows.stage import ERROR, environment


class PromotionFailedError(Exception):
    """The student was not registered, compared or published; the message says why."""


def promote(
    root: Path,
    publish: str | None,
    *,
    env: Mapping[str, str],
    hear: Callable[[str], None],
    stop: threading.Event,
    workspace: int,
) -> None:
    """Register the student, decide who is champion, and publish its exports.

    Args:
        root: The workspace.
        publish: Where the champion's exports are copied to; None for nowhere.
        env: What its environment has beside ours.
        hear: Called with each line that is printed.
        stop: Cancels it when set.
        workspace: The descriptor of its lock.

    Raises:
        PromotionFailedError: see there.
        flows.child.Stopped: `stop` was set.
    """
    errors: list[str] = []

    def keep(line: str) -> None:
        if line.startswith(ERROR):
            errors.append(line.removeprefix(ERROR))
        hear(line)

    command = [sys.executable, "-m", "kd", "promote"]
    command += ["--publish", publish] if publish else []
    whole = {**environment(), **env}
    code = child.run(command, cwd=root, env=whole, hear=keep, stop=stop, hold=[workspace])
    if code:
        raise PromotionFailedError(
            f"every stage is up to date, but `kd promote` ended with exit code {code}; "
            f"run it again: {errors[-1] if errors else 'it did not say why'}"
        )
