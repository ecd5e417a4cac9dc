"""A comparison's report: a table with spreads and paired differences over seeds.

S seeds, N samples, C classes.
"""

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.special import stdtr, stdtrit  # Student's t: distribution, quantiles

from kd import artifacts, manifest
from kd.compare.plan import Comparison
from kd.component import Refused
from kd.data import Images
from kd.evaluate import holm, predict
from kd.examine import ensembles, row_metrics
from kd.report import WEIGHTED

ENSEMBLE = "ensemble"
"""The row of the weighted ensemble of assistants; all other rows have run names."""
CELL = "baselines/"
"""Prefix of the run names of cells, and of no others."""
MEASURES = {
    "test_accuracy": "test accuracy, %",
    "test_worst_class_accuracy": "worst class, %",
    "test_nll": "NLL",
    "test_ece": "ECE, %",
    "test_agreement": "agreement with teacher, %",
    "cpu_seconds": "training, CPU s",
}
NOTE = (
    "Each interval is Student's t over the seeds' paired differences, for that row alone; p is "
    "corrected for the number of rows (Holm 1979): below 0.05, a difference is unlikely to be the "
    "luck of one row among so many. A seed decides initial weights and batch order, and how the "
    "images are split unless the test split is official. A fixed test split leaves the choice of "
    "test images out of the interval; splits that overlap between seeds are treated as "
    "independent, which makes the interval too narrow (Nadeau & Bengio 2003, Inference for the "
    "Generalization Error). Training time is the CPU time of a unit's own process, peers "
    "included, without the tables of teachers' outputs, which are made once and shared."
)
NOTED = {
    "failed": "Diverged, so without a row",
    "resumed": "Started more than once, so CPU seconds are those of the last attempt only",
}
"""Flags in units' records, and how the report explains them."""


def build(comparison: Comparison) -> dict[str, Any]:
    """All figures of a finished comparison; evaluates on the test split of each seed."""
    failed = failures(comparison)
    seeds = [of_seed(comparison, seed, set(failed)) for seed in range(comparison.about.seeds)]
    rows = {
        name: {measure: [seed[name][measure] for seed in seeds] for measure in MEASURES}
        for name in seeds[0]
    }
    return {
        "name": comparison.about.name,
        "seeds": comparison.about.seeds,
        "reference": comparison.about.reference,
        "epochs": comparison.params[0].student.recipe.epochs,
        "samples_seen": {name: seeds[0][name]["samples_seen"] for name in seeds[0]},
        "code": artifacts.code_digest(),
        "torch": torch.__version__,
        "failed": failed,
        "resumed": noted(comparison, "resumed"),
        "rows": rows,
    }


def failures(comparison: Comparison) -> dict[str, int]:
    """Cells whose training diverged, with the number of seeds; they have no row."""
    found = noted(comparison, "failed")
    if f"{CELL}{comparison.about.reference}" in found:
        raise Refused(f"the reference {comparison.about.reference} diverged: {found}")
    return found


def noted(comparison: Comparison, what: str) -> dict[str, int]:
    """By run name: in how many seeds the unit's record has the flag `what`."""
    units = comparison.units.values()
    said = [unit for unit in units if artifacts.read_json(comparison.record(unit)).get(what)]
    return dict(Counter(unit.run_name for unit in said))


def of_seed(
    comparison: Comparison, seed: int, failed: Collection[str]
) -> dict[str, dict[str, float]]:
    """Test figures of every network of a seed and of its ensemble, by row."""
    params = comparison.params[seed]
    with contextlib.chdir(comparison.workspace(seed)):
        test = Images.load(artifacts.DATA, "test")
        assistants = [f"assistants/{name}" for name in params.assistants]
        cells = [f"{CELL}{name}" for name in params.baselines]
        names = ["teacher", *assistants, *(name for name in cells if name not in failed)]
        logits = {name: predict(manifest.load(artifacts.folder(name))[0], test) for name in names}
        found = {}
        for name, logits_NC in logits.items():
            unit = comparison.units[f"seed-{seed}/{name}"]
            metrics = artifacts.read_json(artifacts.folder(name) / "metrics.json")
            found[name] = {
                **row_metrics(logits_NC, test.labels_N, logits["teacher"]),
                "cpu_seconds": artifacts.read_json(comparison.record(unit))["cpu_seconds"],
                "samples_seen": metrics["samples_seen"],
            }
        found[ENSEMBLE] = {
            **row_metrics(ensembles(logits)[WEIGHTED], test.labels_N, logits["teacher"]),
            "cpu_seconds": 0.0,
            "samples_seen": 0.0,
        }
    return found


def markdown(record: Mapping[str, Any]) -> str:
    """The report in Markdown, its cells sorted by their gain over the reference."""
    rows, reference = record["rows"], f"{CELL}{record['reference']}"
    cells = [name for name in rows if name.startswith(CELL)]
    base = rows[reference]["test_accuracy"]
    freedom = record["seeds"] - 1
    gains = {name: paired(rows[name]["test_accuracy"], base) for name in cells}
    others = {name: gains[name] for name in cells if name != reference}
    chances = holm({name: chance(*gain, freedom) for name, gain in others.items()})
    minus = f"minus {record['reference']}, points [95 % CI]"
    head = [*MEASURES.values(), minus, "p (Holm)", "seeds won"]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    above = [name for name in rows if name not in cells]
    for name in (*above, *sorted(cells, key=lambda each: -gains[each][0])):
        figures = [spread(rows[name][measure], measure) for measure in MEASURES]
        gained = ["", "", ""]
        if name in others:
            mean, error = others[name]
            half = stdtrit(freedom, 0.975) * error
            pairs = zip(rows[name]["test_accuracy"], base, strict=True)
            won = sum(ours > theirs for ours, theirs in pairs)
            gained = [
                f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]",
                f"{chances[name]:.3f}",
                f"{won} of {record['seeds']}",
            ]
        lines.append(f"| {shown(name, rows)} | {' | '.join([*figures, *gained])} |")
    budget = f"{record['epochs']} epochs for every cell{several(record, cells)}"
    said = f"{record['seeds']} seeds, {budget}; mean ± deviation."
    notes = [NOTE]
    for key, sentence in NOTED.items():
        said_of = [f"{shown(name, rows)} in {num}" for name, num in record[key].items()]
        if names := ", ".join(said_of):
            notes.append(f"{sentence}: {names} seeds.")
    return "\n\n".join([said, "\n".join(lines), *notes]) + "\n"


def several(record: Mapping[str, Any], cells: Sequence[str]) -> str:
    """Names the cells that trained for a multiple of these epochs, over several generations."""
    seen, usual = record["samples_seen"], record["samples_seen"][f"{CELL}{record['reference']}"]
    longer = {shown(name, record["rows"]): seen[name] / usual for name in cells}
    found = [f"{times:g} times that for {name}" for name, times in longer.items() if times > 1]
    return f" ({', '.join(found)})" if found else ""


def shown(name: str, rows: Collection[str]) -> str:
    """A row's displayed name: a cell's short one, unless another row has that name."""
    short = name.removeprefix(CELL)
    return name if short in rows else short


def paired(ours_S: Sequence[float], theirs_S: Sequence[float]) -> tuple[float, float]:
    """Mean difference over seeds in percentage points, and its standard error."""
    gaps = [100 * (a - b) for a, b in zip(ours_S, theirs_S, strict=True)]
    return statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def chance(mean: float, error: float, freedom: int) -> float:
    """Two-sided p by Student's t of a paired difference with this mean and standard error."""
    if error == 0:  # the same difference in each seed
        return 0.0 if mean else 1.0
    return float(2 * stdtr(freedom, -abs(mean / error)))


def spread(values_S: Sequence[float], measure: str) -> str:
    """Mean and standard deviation over seeds; fractions as percentages."""
    percent = measure not in ("test_nll", "cpu_seconds")
    scale, digits = (100, 2) if percent else (1, 1 if measure == "cpu_seconds" else 3)
    mean, deviation = statistics.mean(values_S), statistics.stdev(values_S)
    return f"{scale * mean:.{digits}f} ± {scale * deviation:.{digits}f}"


def write(comparison: Comparison, folder: Path) -> str:
    """Write report.json, report.md and results.csv; returns the content of report.md."""
    record = build(comparison)
    table = markdown(record)
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(folder / "report.json", record)
    with artifacts.atomic(folder / "report.md") as temporary:
        temporary.write_text(table, "utf-8")
    rows = [
        {"cell": name, "seed": seed, **{m: values[m][seed] for m in MEASURES}}
        for name, values in record["rows"].items()
        for seed in range(record["seeds"])
    ]
    artifacts.write_csv(folder / "results.csv", rows)
    return table


def into(page: Path, name: str, table: str) -> None:
    """Replace a page's table, which is between `<!-- NAME -->` and `<!-- /NAME -->`."""
    text = page.read_text("utf-8")
    before, opening, rest = text.partition(f"<!-- {name} -->\n")
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    if not (opening and closing):
        raise artifacts.ArtifactError(f"{page} has no <!-- {name} --> ... <!-- /{name} -->")
    with artifacts.atomic(page) as temporary:
        temporary.write_text(f"{before}{opening}{table}{closing}{after}", "utf-8")
