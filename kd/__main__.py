"""`python -m kd STAGE [NAME]`, `kd check`, `kd bench`, `kd lineage`, `kd promote`: no logic.

dvc.yaml runs it, one process per stage; nothing heavy is imported until the arguments and
params.yaml have been checked.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kd import FAMILIES, STAGES, __version__, disk, launch, signals, warm

if TYPE_CHECKING:
    from kd.params import Params


def main() -> int:
    """Run a command in the warm process if there is one, else here; return the exit status."""
    signals.end_quietly()
    argv = sys.argv[1:]
    if os.getcwd() not in sys.path:  # for user code: the `kd` script, unlike `python -m`, lacks it
        sys.path.insert(0, os.getcwd())
    if "KD_RANKS" in os.environ:
        launch.become_rank()
        return run(argv)
    if "KD_PIPELINE_RUN" not in os.environ and (name := warm.pipeline_run()):
        os.environ["KD_PIPELINE_RUN"] = name
    status = warm.delegate(argv)
    if status is not None:
        return status
    if "KD_FLOW_RUN_ID" not in os.environ:  # a flow's leash ends us, too, but lets us save first
        warm.end_with_dvc()  # else the next run would train beside us
    return run(argv)


def run(argv: list[str]) -> int:
    """Run a command; return 0, 2 for invalid input or 1 for another failure."""
    from kd.component import ConfigError, Refused, missing_package

    arguments = parser().parse_args(argv)
    signals.end_quietly()
    try:
        if arguments.command == "check":
            check_experiment()
        elif arguments.command == "bench":
            bench_file(arguments)
        elif arguments.command == "lineage":
            trace_file(arguments.file)
        elif arguments.command == "promote":
            promote_student(arguments.publish, arguments.replace)
        else:
            run_stage(arguments.command, getattr(arguments, "name", ""))
    except ConfigError as error:
        return refused(str(error), 2)
    except OSError as error:
        if said := disk.remedy(error):
            return refused(said, 1)
        raise
    except ModuleNotFoundError as error:
        if said := missing_package(error):
            return refused(said, 2)
        raise
    except Refused as error:
        return refused(str(error), 1)
    return 0


def refused(reason: str, status: int) -> int:
    """Print why this process exits with `status`, unless another rank has printed it."""
    if launch.falls_first(status):
        print(f"error: {reason}", file=sys.stderr)
    return status


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    made = argparse.ArgumentParser(
        prog="kd", description="Run one stage of the pipeline, or inspect an exported file."
    )
    made.add_argument("--version", action="version", version=f"kd {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage in STAGES:
        one = commands.add_parser(stage, help="a stage; dvc.yaml lists its inputs")
        if stage in FAMILIES:
            one.add_argument("name", help=f"a key of params.yaml's {stage}")
    commands.add_parser("check", help="check params.yaml without running a stage")
    bench = commands.add_parser("bench", help="measure an exported file on this machine")
    bench.add_argument("file", type=Path, help="an exported file: .onnx, .pte, ...")
    bench.add_argument(
        "--batch", type=positive, nargs="+", default=[1, 8], help="images per call (1 8)"
    )
    bench.add_argument(
        "--threads", type=positive, nargs="+", default=[1], help="runtime threads (1)"
    )
    bench.add_argument("--seconds", type=float, default=1.0, help="spent on each row (1)")
    lineage = commands.add_parser("lineage", help="trace a file to its student, teachers and data")
    lineage.add_argument(
        "file", type=Path, help="an exported file, a bundle, a model.safetensors, or a SHA-256"
    )
    promote = commands.add_parser(
        "promote", help="register the student, and make it champion if it beats the current one"
    )
    promote.add_argument(
        "--replace", action="store_true", help="make it champion without a comparison"
    )
    promote.add_argument("--publish", metavar="URL", help="copy the champion's exports there")
    return made


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def check_experiment() -> None:
    """Check params.yaml, the models and methods that it names, and artifacts/ for leftovers.

    DVC does not delete what was made for a key that is no longer in params.yaml.
    """
    from kd import params as experiment
    from kd import workspace

    params = experiment.load()
    experiment.check_own(params)
    workspace.check_foreign(vars(params))
    print("params.yaml: OK")


def bench_file(arguments: argparse.Namespace) -> None:
    """Print an exported file's speed, memory and size here."""
    from kd import bench

    around = bench.surroundings(arguments.file)
    record = bench.measure(arguments.file, arguments.batch, arguments.threads, arguments.seconds)
    print(bench.table(record))
    print(f"\nIt is {around}.")


def trace_file(file: Path) -> None:
    """Print a file's lineage."""
    from kd import lineage

    print(lineage.tell(file))


def promote_student(url: str | None, replace: bool) -> None:
    """Register the student in artifacts/, decide who is champion, and publish its exports."""
    from kd import params as experiment
    from kd import tracking

    params = experiment.load()
    if not params.tracking:
        print("tracking is false in params.yaml: there is no registry to promote in")
        return
    tracking.start()[0].close()

    import torch

    from kd import manifest, promotion, publish, stages

    torch.set_num_threads(1)
    sha256 = manifest.read(promotion.STUDENT).sha256
    with tracking.run(
        "student",
        params=experiment.of_stage(params, "student", ""),
        tags={**stages.tags("student"), "kd.sha256": sha256},
        resume=True,  # the run that trained it, if there is one
    ) as run:
        print(promotion.promote(run, compare=not replace))
        if url:
            print(publish.champion(run, promotion.REGISTERED_NAME, url))
    if run.error:
        raise tracking.TrackingError(tracking.tracking_uri(), run.error)


def run_stage(stage: str, name: str) -> None:
    """Check the experiment, open the tracking run, and run the stage."""
    from kd import params as experiment
    from kd import tracking, workspace
    from kd.component import ConfigError
    from kd.machine import write_run_record

    params = experiment.load()
    known = getattr(params, stage) if stage in FAMILIES else [""]
    if name not in known:
        raise ConfigError(f"{stage} has no {name!r} in params.yaml; it has {', '.join(known)}")
    experiment.check_own(params, stage)
    run_name = f"{stage}/{name}" if name else stage
    workspace.check_foreign(vars(params))
    workspace.check_writable(run_name)
    spread(stage, name, devices_of(params, stage, name))
    tracked = params.tracking and launch.is_first()
    if tracked:
        tracking.start()[0].close()  # it imports MLflow meanwhile

    import torch

    from kd import stages

    torch.set_num_threads(1)  # sums must not depend on the machine; a recipe sets its own
    started = time.time()
    with tracking.run(
        stage,
        name or None,
        params=experiment.of_stage(params, stage, name),
        tags=stages.tags(stage),
        enabled=tracked,
    ) as run:
        stages.STAGES[stage](params, name, run)
        run.log_tags({"kd.artifacts": str(workspace.folder(run_name))})
        if launch.is_first():
            write_run_record(run_name, started, run.id, run.url)


def devices_of(params: "Params", stage: str, name: str) -> int:
    """How many devices share the training of a stage; 1 if it trains nothing."""
    if stage == "teacher":
        return params.teacher.recipe.devices
    if stage == "assistants":
        return params.assistants[name].recipe.devices
    return params.student.recipe.devices if stage in ("student", "baselines") else 1


def spread(stage: str, name: str, devices: int) -> None:
    """Run the stage as one rank per device if there are several; only the first one prints."""
    if devices > 1 and "LOCAL_RANK" not in os.environ:
        sys.stdout.flush()
        command = [sys.executable, "-m", "kd", stage, *name.split()]
        sys.exit(launch.run(command, devices))
    if not launch.is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
