"""Python imports this as it starts, where PYTHONPATH names its folder: it notes each step that a
training saves, and holds the training where it is told to, for a test that kills it there.

The trainings of the tests take a second or two: on a busy machine, whoever looked at their files
from outside would often find them ended.
"""

import os
import time
from pathlib import Path

FILES = os.environ["HOLD_FILES"]
"""Which checkpoints, as a pattern."""
LOG = Path(os.environ["HOLD_LOG"])
"""Gets a line for each step saved; beside it .held appears when a training is held."""
POINT = os.environ["HOLD_AT"]
"""Such as "38 written" (but not in its place yet) or "38 saved"; or nothing."""

replace = os.replace


def noting(source, target, **folders):
    """os.replace, by which a checkpoint takes the place of the last."""
    if not Path(target).match(FILES):
        return replace(source, target, **folders)
    step = step_of(source)
    hold_at(f"{step} written")
    replace(source, target, **folders)
    with LOG.open("a") as log:
        log.write(f"{step}\n")
    return hold_at(f"{step} saved")


def step_of(checkpoint):
    from safetensors import safe_open

    with safe_open(checkpoint, framework="np") as file:
        return int(file.get_tensor("progress/done"))


def hold_at(point):
    if point == POINT:
        LOG.with_suffix(".held").touch()
        while True:  # SIGTERM only leaves a note, and does not end this
            time.sleep(1)


os.replace = noting
