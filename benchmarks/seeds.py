"""The demo's table over several seeds: mean, standard deviation, and paired differences.

    python benchmarks/seeds.py --seeds 10 --processes 2

Each seed is the whole experiment of params.yaml again (other splits, other initial weights), run
stage by stage in a folder of its own, without exports.  The table goes to standard output as
Markdown; benchmarks/RECORDS.md keeps it with the command, the commit and the machine.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

COLUMNS = ("val_accuracy", "test_accuracy", "test_nll", "test_worst_class_accuracy")


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="repetitions, at least 2")
    parser.add_argument("--first", type=int, default=0, help="the first seed; others follow it")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="seeds at a time")
    arguments = parser.parse_args()
    started = time.time()
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.processes, maxtasksperchild=1) as pool:
        seeds = range(arguments.first, arguments.first + arguments.seeds)
        reports = pool.map(run_seed, seeds, chunksize=1)
    seconds = time.time() - started
    print(f"seeds {seeds[0]} to {seeds[-1]}, {seconds:.0f} s, {arguments.processes} processes\n")
    print("\n".join([*table(reports), "", *differences(reports)]))


def run_seed(seed: int) -> dict[str, dict[str, float]]:
    """The rows of the report of one repetition, by name."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        from kd import params, report, stages
        from kd.examine import examine, names_of
        from kd.tracking import NullRun

        plain = (PROJECT / "params.yaml").read_text().replace("\nseed: 0\n", f"\nseed: {seed}\n")
        Path("params.yaml").write_text(plain)
        experiment = params.load()
        assert experiment.seed == seed
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            for stage in ("data", "teacher", "assistants", "weights", "student", "baselines"):
                section = getattr(experiment, stage)
                for name in section if stage in ("assistants", "baselines") else [""]:
                    stages.STAGES[stage](experiment, name, NullRun())
        test, names = examine(experiment), names_of(experiment)
        names = report.Names(**{**vars(names), "exports": []})
        record = report.build(Path("artifacts"), names, test)
        os.chdir("/")
    return {row["name"]: row for row in record["rows"]}


def table(reports: list[dict[str, dict[str, float]]]) -> list[str]:
    """Mean and standard deviation of each row's figures."""
    lines = ["| | " + " | ".join(column.replace("_", " ") for column in COLUMNS) + " |"]
    lines.append("|---|" + "---:|" * len(COLUMNS))
    for name in reports[0]:
        cells = [
            spread([report[name][column] for report in reports], column) for column in COLUMNS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def spread(values: list[float], column: str) -> str:
    """Mean +- standard deviation; accuracies in percent."""
    scale, digits = (100, 2) if "accuracy" in column else (1, 4)
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{scale * mean:.{digits}f} ± {scale * deviation:.{digits}f}"


PAIRS = (
    ("student", "baselines/labels"),
    ("student", "baselines/teacher"),
    ("student", "baselines/best_single"),
    ("student", "baselines/uniform"),
    ("ensemble/weighted", "ensemble/uniform"),
    ("ensemble/weighted", "assistants/small"),
    ("ensemble/weighted", "teacher"),
    ("student", "teacher"),
)


def differences(reports: list[dict[str, dict[str, float]]]) -> list[str]:
    """Paired differences of test accuracy, in points: standard error and 95 % interval (t)."""
    from scipy.special import stdtrit

    from kd.compare.report import paired

    lines = [
        "| test accuracy, points | mean difference ± standard error [95 % CI] | seeds won |",
        "|---|---:|---:|",
    ]
    for pair in PAIRS:
        ours, theirs = ([report[name]["test_accuracy"] for report in reports] for name in pair)
        mean, error = paired(ours, theirs)
        half = stdtrit(len(reports) - 1, 0.975) * error
        won = sum(a > b for a, b in zip(ours, theirs, strict=True))
        interval = f"[{mean - half:+.2f}, {mean + half:+.2f}]"
        name = " - ".join(pair)
        lines.append(
            f"| {name} | {mean:+.2f} ± {error:.2f} {interval} | {won} of {len(reports)} |"
        )
    return lines


if __name__ == "__main__":
    main()
