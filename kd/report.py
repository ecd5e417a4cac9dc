"""The results: a table, what it means, figures, and CSVs for `dvc plots`, all from records.

No number is typed by hand, and no network is run here: the report stage (kd/stages.py) opens the
test split and passes its measurements as `Test`; everything else is read from the records that
the stages left in artifacts/.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kd import artifacts, figures
from kd.component import ConfigError
from kd.evaluate import Bin
from kd.findings import CLEAR, LEVEL, findings, percent

# N samples, C classes

WEIGHTED, UNIFORM = "ensemble/weighted", "ensemble/uniform"
"""The rows of the two ensembles; every other row is a run name, teacher or assistants/large."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A difference on the same test images, so that the images' difficulty cancels."""

    difference: float
    """Mean over the images of (first right) - (other right), in [-1, 1]."""
    standard_error: float
    """Of that mean: the standard deviation over the images, divided by sqrt(N)."""
    gained: int
    """How many images only the student is right on."""
    lost: int
    """How many only the other is right on."""


@dataclass(frozen=True, kw_only=True)
class Test:
    """What the report stage measured on the test split."""

    scores: Mapping[str, Mapping[str, float]]
    """By row: test_accuracy, test_nll, test_ece, test_worst_class_accuracy, test_agreement.

    Rows are teacher, assistants/<name>, ensemble/uniform, ensemble/weighted, student and
    baselines/<name>.  test_agreement (with the teacher) may lack the teacher's own."""
    student_minus: Mapping[str, Paired]
    """By row, for every row but the student: how the student's accuracy differs from it."""
    ensemble_minus_teacher: Paired
    """How the weighted ensemble's accuracy differs from the teacher's."""
    over_constant: Mapping[str, Paired]
    """By row: how its accuracy differs from that of always naming the most frequent class."""
    labels_N: Sequence[int]
    """Class indices of the test images."""
    predicted_N: Sequence[int]
    """The student's."""
    confusion_CC: Sequence[Sequence[int]]
    """How many images of each class (row) the student assigns to each class (column)."""
    bins: Sequence[Bin]
    """Of the student's confidence: those of its test_ece."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the experiment consists of, in the order of params.yaml."""

    assistants: Sequence[str]
    baselines: Sequence[str]
    exports: Sequence[str]
    class_names: Sequence[str]


def build(root: Path, names: Names, test: Test) -> dict[str, Any]:
    """The report's record, a pure function of records and measurements.

    Args:
        root: The artifacts folder.
        names: Which records to read.
        test: What was measured on the test split.

    Returns:
        num_test, rows (the table), weights, exports, student_minus, ensemble_minus_teacher,
        over_constant, and findings (sentences).

    Raises:
        ConfigError: a record or a test score is missing; the message names it.
    """
    weights = artifacts.read_json(root / "weights/weights.json")
    rows = [
        _network(root, "teacher", "teacher", test),
        *(_network(root, f"assistants/{name}", "assistant", test) for name in names.assistants),
    ]
    short = {name.rpartition("/")[2] for name in weights["members"]}
    members = [row for row in rows if row["name"].rpartition("/")[2] in short]
    rows += [
        _ensemble(UNIFORM, weights["sets"]["uniform"], members, test),
        _ensemble(WEIGHTED, weights["sets"]["chosen"], members, test),
        _network(root, "student", "student", test),
        *(_network(root, f"baselines/{name}", "baseline", test) for name in names.baselines),
    ]
    report: dict[str, Any] = {
        "num_test": len(test.labels_N),
        "rows": rows,
        "weights": {
            key: weights[key]
            for key in ("members", "num_val", "sets", "gain", "searched", "shrinkage")
        },
        "exports": [_export(root, name) for name in names.exports],
        "student_minus": {name: asdict(paired) for name, paired in test.student_minus.items()},
        "ensemble_minus_teacher": asdict(test.ensemble_minus_teacher),
        "over_constant": {name: asdict(paired) for name, paired in test.over_constant.items()},
    }
    return {**report, "findings": findings(report)}


def metrics(report: Mapping[str, Any]) -> dict[str, Any]:
    """The table's numbers by row and column, as `dvc metrics` needs them."""
    return {
        row["name"]: {key: value for key, value in row.items() if isinstance(value, int | float)}
        for row in report["rows"]
    }


def to_markdown(report: Mapping[str, Any], latency_ms: Mapping[str, float] | None = None) -> str:
    """The report as Markdown.

    Args:
        report: What `build` returned.
        latency_ms: By row, and by exports/<format>: median time for one image.  It differs from
            run to run, so it is not in the record.
    """
    latency = latency_ms or {}
    return "\n\n".join(
        [
            "# Report",
            _table(
                ["", "validation", "test", "parameters", "size", "latency"],
                [
                    [
                        row["name"],
                        percent(row["val_accuracy"]),
                        percent(row["test_accuracy"]),
                        f"{row['parameters']:,}",
                        _size(row["size_bytes"]),
                        _milliseconds(latency.get(row["name"])),
                    ]
                    for row in report["rows"]
                ],
            ),
            "Validation and test are accuracies; an ensemble's validation accuracy is held out: "
            "its weights were found on other folds. Latency is the median for one image.",
            *report["findings"],
            "A difference in accuracy counts if McNemar's exact two-sided test, with Holm's "
            f"correction for all comparisons of its kind, has p <= {LEVEL:g}; one in NLL, if it "
            f"exceeds {CLEAR:g} standard errors. Both account for the choice of images only: "
            "networks also differ from seed to seed.",
            "## Weights",
            _weights_table(report["weights"]),
            "Held out: found on four folds of the validation split, scored on the fifth."
            + _moved(report["weights"]),
            *(
                [
                    "## Exports",
                    _exports_table(report["exports"], latency),
                    "Max difference (of any output: logits, or probabilities if the file takes "
                    "raw images) and agreement (of the predicted class) are with the "
                    "student, over the validation images.",
                ]
                * bool(report["exports"])
            ),
            "",
        ]
    )


def write(
    folder: Path,
    root: Path,
    report: Mapping[str, Any],
    names: Names,
    test: Test,
    latency_ms: Mapping[str, float],
) -> None:
    """Write report.json, metrics.json, latency.json, report.md, CSVs and figures.

    All but latency.json and report.md, which hold times, depend only on the records.

    Args:
        folder: Where they go.
        root: The artifacts folder, for the networks' curves.
        report: What `build` returned.
        names: What the experiment consists of.
        test: What was measured on the test split.
        latency_ms: As in `to_markdown`.
    """
    pictures = folder / "figures"
    pictures.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(folder / "report.json", report)
    artifacts.write_json(folder / "metrics.json", metrics(report))
    artifacts.write_json(folder / "latency.json", latency_ms)
    (folder / "report.md").write_text(to_markdown(report, latency_ms), "utf-8")
    named = [
        {"actual": names.class_names[actual], "predicted": names.class_names[predicted]}
        for actual, predicted in zip(test.labels_N, test.predicted_N, strict=True)
    ]
    bins = [asdict(each) for each in test.bins]
    artifacts.write_csv(folder / "confusion.csv", named)
    artifacts.write_csv(folder / "reliability.csv", bins)
    artifacts.write_csv(folder / "results.csv", report["rows"])
    for name, figure in {
        "curves": figures.learning(_curves(root, report)),
        "confusion": figures.confusion(test.confusion_CC, names.class_names),
        "reliability": figures.reliability(bins),
        "sizes": figures.sizes(report["rows"]),
        "weights": figures.weights(report["weights"]),
    }.items():
        figures.save(figure, pictures / f"{name}.png")


def _curves(root: Path, report: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """The rows of each trained network's curves.csv."""
    curves = {}
    for name in (row["name"] for row in report["rows"] if row["role"] != "ensemble"):
        curves[name] = figures.read_rows(root / name / "curves.csv")
    return curves


def _network(root: Path, name: str, role: str, test: Test) -> dict[str, Any]:
    """The table's row for a trained network."""
    path = root / name / "metrics.json"
    record = artifacts.read_json(path)
    wanted = ("val_accuracy", "val_nll", "parameters", "multiply_adds", "size_bytes")
    return {
        "name": name,
        "role": role,
        **{key: _get(record, key, path) for key in wanted},
        **_scores(test, name),
    }


def _ensemble(
    name: str, found: Mapping[str, Any], members: Sequence[Mapping[str, Any]], test: Test
) -> dict[str, Any]:
    """The table's row for an ensemble: its members' total size, and held-out scores."""
    return {
        "name": name,
        "role": "ensemble",
        "val_accuracy": found["held_out_accuracy"],
        "val_nll": found["held_out_nll"],
        **{
            key: sum(member[key] for member in members)
            for key in ("parameters", "multiply_adds", "size_bytes")
        },
        **_scores(test, name),
    }


def _scores(test: Test, name: str) -> dict[str, float]:
    if name not in test.scores:
        raise ConfigError(f"no test scores for {name}; it has {', '.join(sorted(test.scores))}")
    keys = ("test_accuracy", "test_nll", "test_ece", "test_worst_class_accuracy")
    # The teacher agrees with itself; the CSV needs every column in every row.
    scores = {"test_agreement": 1.0, **test.scores[name]}
    return {key: scores[key] for key in (*keys, "test_agreement")}


def _export(root: Path, name: str) -> dict[str, Any]:
    """An export's file and how it compares with the student it was made from."""
    path = root / "exports" / name / "parity.json"
    record = artifacts.read_json(path)
    wanted = (
        "file",
        "max_abs",
        "top1_agreement",
        "val_accuracy",
        "eager_val_accuracy",
        "size_bytes",
    )
    return {"format": name, **{key: _get(record, key, path) for key in (*wanted, "num_images")}}


def _weights_table(weights: Mapping[str, Any]) -> str:
    members = weights["members"]
    return _table(
        ["", *members, "held-out NLL", "held-out accuracy", "evaluations"],
        [
            [
                name.replace("_", " "),
                *(f"{found['weights'][member]:.3f}" for member in members),
                f"{found['held_out_nll']:.4f}",
                percent(found["held_out_accuracy"]),
                f"{found['evaluations']:,}",
            ]
            for name, found in weights["sets"].items()
        ],
    )


def _moved(weights: Mapping[str, Any]) -> str:
    """How far cross-validation shrank the weights from those of the search, if at all."""
    if not weights["shrinkage"]:
        return ""
    searched = ", ".join(f"{name} {found:.3f}" for name, found in weights["searched"].items())
    return (
        f" The search itself ended at {searched}; cross-validation moved it "
        f"{percent(weights['shrinkage'])} of the way to uniform."
    )


def _exports_table(exports: Sequence[Mapping[str, Any]], latency: Mapping[str, float]) -> str:
    return _table(
        ["file", "size", "max difference", "agreement", "validation (eager)", "latency"],
        [
            [
                f"artifacts/exports/{one['format']}/{one['file']}",
                _size(one["size_bytes"]),
                f"{one['max_abs']:.1e}",
                percent(one["top1_agreement"]),
                f"{percent(one['val_accuracy'])} ({percent(one['eager_val_accuracy'])})",
                _milliseconds(latency.get(f"exports/{one['format']}")),
            ]
            for one in exports
        ],
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text, numbers aligned right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in pairs) + " |"
        for pairs in (list(enumerate(zip(row, widths, strict=True))) for row in cells)
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def _milliseconds(median: float | None) -> str:
    return "" if median is None else f"{median:.2f} ms"


def _get(record: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in record:
        raise ConfigError(f"{path} has no {key!r}: run its stage again")
    return record[key]
