"""Run `kd promote`, which picks the champion, in its own process: flows hold no tensors.

It runs whenever there is a student, whatever was stale: otherwise a promotion that a crash
interrupted would never be made up for.  Repeating it changes nothing.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from flows import child
from flows.stage import ERROR, environment


class PromotionFailedError(Exception):
    """The student could not be registered, compared or published; the message says why."""


def promote(
    root: Path,
    publish: str | None,
    *,
    env: Mapping[str, str],
    hear: Callable[[str], None],
    stop: threading.Event,
    workspace: int,
) -> None:
    """Register the student, pick the champion, and publish the champion's exports.

    Args:
        root: The workspace.
        publish: Where to copy the champion's exports; None for nowhere.
        env: Environment variables to add to ours.
        hear: Called with each line that is printed.
        stop: Cancels the promotion when set.
        workspace: The descriptor of the workspace's lock.

    Raises:
        PromotionFailedError: `kd promote` failed.
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
            f"run it again: {errors[-1] if errors else 'it gave no reason'}"
        )
