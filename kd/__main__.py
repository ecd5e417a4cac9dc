"""`python -m kd STAGE [NAME]`: the command line, no logic.

dvc.yaml calls it, one process for one stage; nothing heavy is imported before the arguments and
params.yaml are known to be good.
"""

import argparse
import errno
import shutil
import signal
import sys
import time
from types import FrameType

from kd import FAMILIES, STAGES, warm


def main() -> int:
    """Run a stage in this process, or in a warm one where the flow keeps one; the exit status."""
    argv = sys.argv[1:]
    status = warm.delegate(argv)
    return run(argv) if status is None else status


def run(argv: list[str]) -> int:
    """Run the stage that the arguments name; 2 where the input is at fault, 1 for a failure."""
    from kd.component import ConfigError, Refused

    arguments = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        run_stage(arguments.stage, arguments.name)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and shutil.disk_usage(".").free > 2**20:  # numpy's errors have no number
            raise
        print(f"error: the disk is full ({error}); nothing half-written was kept", file=sys.stderr)
        return 1
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    made = argparse.ArgumentParser(prog="kd", description="Run one stage of the pipeline.")
    made.add_argument("stage", choices=STAGES, help="what to run; dvc.yaml says what it reads")
    made.add_argument(
        "name", nargs="?", default="", help=f"which one of {', '.join(FAMILIES)} (params.yaml)"
    )
    return made


def run_stage(stage: str, name: str) -> None:
    """Check the experiment, open the tracking run, and do the stage's work."""
    from kd import params as experiment
    from kd import tracking
    from kd.component import ConfigError

    params = experiment.load()
    known = getattr(params, stage) if stage in FAMILIES else [""]
    if name not in known:
        raise ConfigError(f"{stage} has no {name!r} in params.yaml; it has {', '.join(known)}")
    if params.tracking:
        tracking.start()[0].close()  # MLflow is imported elsewhere while torch is imported here

    import torch

    from kd import artifacts, stages

    torch.set_num_threads(1)  # sums must not depend on the machine; a recipe may set its own
    run_name = f"{stage}/{name}" if name else stage
    artifacts.check_foreign({family: set(getattr(params, family)) for family in FAMILIES})
    started = time.time()
    with tracking.run(
        stage,
        name or None,
        params=experiment.of_stage(params, stage, name),
        tags=stages.tags(stage),
        enabled=params.tracking,
    ) as run:
        stages.STAGES[stage](params, name, run)
        run.log_tags({"kd.artifacts": str(artifacts.folder(run_name))})
        artifacts.write_run_record(run_name, started, run.id, run.url)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that files are closed and the run ends as killed."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
