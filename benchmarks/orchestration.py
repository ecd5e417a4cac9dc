"""What DVC, Prefect and MLflow cost: `python benchmarks/orchestration.py`, a Markdown table.

The project's own pipeline runs again and again from nothing, in a copy of the repository, one
stage at a time, each time with one more tool around it; a tool's cost is the difference to the row
above.  Training is cut to one epoch, because its length is no cost of these tools, and its noise
would hide them.  Wall time is what a user waits; CPU time is what stays comparable on a machine
that others use as well (it lacks what runs beside the stages and is nobody's child: MLflow's
recorder, and the stages that are forked under `dvc repro`).
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = Path(__file__).parents[1]
COPIED = ("kd", "flows", "dvc.yaml", "params.yaml", ".dvc", ".dvcignore", ".gitignore")
CUT = {"epochs: 20": "epochs: 1", "latency_seconds: 3.0": "latency_seconds: 0.1"}
BARE = """
import sys
from kd import params as experiment
from kd import stages
from kd.tracking import NullRun
params = experiment.load()
for each in sys.argv[1:]:
    stage, _, name = each.partition("@")
    stages.STAGES[stage](params, name, NullRun())
"""
NOOP_RUNS = 5


@dataclass
class Cost:
    """What some commands took, in seconds."""

    wall: float = 0.0
    cpu: float = 0.0
    before: float = 0.0
    """Of the wall time: until the first stage started."""

    said: list[str] = field(default_factory=list)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--as-used", action="store_true", help="no rows but those people run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kd-orchestration-") as folder:
        measure(Path(folder), as_used=arguments.as_used)


def measure(folder: Path, *, as_used: bool) -> None:
    """Run every configuration in a copy of its own below `folder`."""
    copy = workspace(folder / "plan", tracking=False)
    code = "import json, pathlib; from flows import graph; plan = graph.read(pathlib.Path.cwd())"
    listed = run(copy, [["-c", f"{code}; print(json.dumps([each.name for each in plan.stages]))"]])
    stages: list[str] = json.loads(listed.said[-1])
    repro, flow = [["-m", "dvc", "repro"]], [["-m", "flows.pipeline"]]
    processes = [["-m", "kd", *each.split("@")] for each in stages]
    off = {"KD_CPUS": "1", "KD_WARM": "0"}
    warm, everything = "- imports: `dvc repro` with its warm process", "the same, on all cores"
    rows = {
        "stage functions in one process": (False, [["-c", BARE, *stages]], {}),
        "+ a process a stage (Python, imports)": (False, processes, {}),
        "+ DVC: `dvc repro`, `KD_WARM=0`": (False, repro, {"KD_WARM": "0"}),
        warm: (False, repro, {}),
        "DVC + Prefect: the flow, `KD_WARM=0`": (False, flow, off),
        "- imports: the flow with its warm process": (False, flow, {"KD_CPUS": "1"}),
        "+ MLflow: `tracking: true`": (True, flow, {"KD_CPUS": "1"}),
        everything: (True, flow, {}),
    }
    if as_used:
        names = {
            "stage functions in one process": next(iter(rows)),
            "`dvc repro`": warm,
            "the flow with MLflow, on all cores": everything,
        }
        rows = {name: rows[long] for name, long in names.items()}
    print(
        f"{len(stages)} stages, {os.cpu_count()} cores, {platform.processor() or 'CPU'}, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the start\n"
    )
    print("| | wall s | of it, start | CPU s | wall s/stage over bare | CPU s/stage over bare |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    bare = None
    for number, (name, (tracking, commands, env)) in enumerate(rows.items()):
        copy = workspace(folder / str(number), tracking=tracking)
        cost = run(copy, commands, **env)
        bare = bare or cost
        wall = (cost.wall - cost.before - bare.wall) / len(stages)
        cpu = (cost.cpu - bare.cpu) / len(stages)
        print(
            f"| {name} | {cost.wall:.1f} | {cost.before:.1f} | {cost.cpu:.1f} "
            f"| {wall:+.2f} | {cpu:+.2f} |",
            flush=True,
        )
    print("\n| nothing to do | wall s, median | smallest | largest |")
    print("| --- | ---: | ---: | ---: |")
    for name, commands in (("`dvc repro`", repro), ("the flow", flow)):
        walls = [run(copy, commands).wall for _ in range(NOOP_RUNS)]
        print(f"| {name} | {statistics.median(walls):.1f} | {min(walls):.1f} | {max(walls):.1f} |")


def workspace(folder: Path, *, tracking: bool) -> Path:
    """A fresh repository with this one's sources and a short experiment."""
    folder.mkdir()
    for name in COPIED:
        source = SOURCES / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "cache", "tmp")
            )
        else:
            shutil.copy(source, folder / name)
    text = (folder / "params.yaml").read_text()
    for old, new in {**CUT, "tracking: true": f"tracking: {str(tracking).lower()}"}.items():
        if old not in text:
            raise SystemExit(f"params.yaml has no {old!r} any more: adapt {Path(__file__).name}")
        text = text.replace(old, new)
    (folder / "params.yaml").write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    # As `make install` does: Prefect's tables take as long as several stages, once.
    upgrade = ["-m", "prefect", "server", "database", "upgrade", "--yes"]
    home = folder / ".kd" / "prefect"
    home.mkdir(parents=True)
    run(folder, [upgrade], PREFECT_HOME=str(home))
    return folder


def run(folder: Path, commands: Sequence[Sequence[str]], **env: str) -> Cost:
    """Run Python with each of `commands` in `folder`, one after the other."""
    kept = {key: value for key, value in os.environ.items() if key[:3] not in ("KD_", "PRE")}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    cost, cpu_before, started = Cost(), children_cpu(), time.monotonic()
    for command in commands:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            # Temporary files of its own: slots and recorders are shared by all runs of a user.
            env={**kept, "TMPDIR": str(folder.parent), "DO_NOT_TRACK": "true", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout
        for line in process.stdout:
            cost.said.append(line.rstrip())
            if "| starts on" in line and not cost.before:
                cost.before = time.monotonic() - started
        if process.wait():
            raise SystemExit("\n".join(cost.said[-20:]))
    cost.wall, cost.cpu = time.monotonic() - started, children_cpu() - cpu_before
    return cost


def children_cpu() -> float:
    """CPU seconds of all children that ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
