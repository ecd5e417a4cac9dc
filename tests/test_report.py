"""The report says what the records say, no more."""

import csv
import dataclasses
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from kd import figures, report
from kd.component import ConfigError
from kd.evaluate import Bin
from kd.examine import paired
from kd.findings import LEVEL, told_apart
from kd.report import Names, Paired

NAMES = Names(
    assistants=["large", "small"],
    baselines=["labels", "best_single"],
    exports=["onnx"],
    class_names=["cat", "dog"],
)
PARAMETERS = {"teacher": 1000, "assistants/large": 400, "assistants/small": 200}
ROWS = [
    "teacher",
    "assistants/large",
    "assistants/small",
    "ensemble/uniform",
    "ensemble/weighted",
    "student",
    "baselines/labels",
    "baselines/best_single",
]


def write(path: Path, record: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


@pytest.fixture
def artifacts(tmp_path):
    """The records of a small experiment."""
    root = tmp_path / "artifacts"
    for name in ROWS:
        if not name.startswith("ensemble"):
            parameters = PARAMETERS.get(name, 100)
            write(
                root / name / "metrics.json",
                {"val_accuracy": 0.9, "val_nll": 0.3, "parameters": parameters,
                 "multiply_adds": 10 * parameters, "size_bytes": 4 * parameters, "epochs": 3},
            )  # fmt: skip
            curve = "epoch,step,val_accuracy\n1,5,0.5\n2,10,0.9\n"
            (root / name / "curves.csv").write_text(curve)
    held_out = {"held_out_nll": 0.25, "held_out_accuracy": 0.925, "val_accuracy": 0.99}
    write(
        root / "weights/weights.json",
        {
            "members": ["large", "small"],
            "num_val": 40,
            "sets": {
                "chosen": {
                    "weights": {"large": 0.7, "small": 0.3},
                    **held_out,
                    "evaluations": 600,
                },
                "uniform": {
                    "weights": {"large": 0.5, "small": 0.5},
                    **held_out,
                    "held_out_nll": 0.27,
                    "evaluations": 0,
                },
            },
            "gain": {
                "over_uniform": {
                    "nll": 0.02,
                    "nll_se": 0.005,
                    "accuracy": 0.01,
                    "accuracy_se": 0.0,
                }
            },
            "searched": {"large": 0.9, "small": 0.1},
            "shrinkage": 0.5,
        },
    )
    write(
        root / "exports/onnx/parity.json",
        {"max_abs": 2.5e-6, "top1_agreement": 1.0, "val_accuracy": 0.875,
         "eager_val_accuracy": 0.9, "size_bytes": 1_250_000, "num_images": 40,
         "file": "model.onnx"},
    )  # fmt: skip
    return root


def counted(gained: int, lost: int, num_images: int = 400) -> Paired:
    """What kd.examine finds where the one alone, and the other alone, is right so often."""
    ours_N, theirs_N = torch.zeros(2, num_images, dtype=torch.bool)
    ours_N[:gained] = True
    theirs_N[gained : gained + lost] = True
    return paired(ours_N, theirs_N)


@pytest.fixture
def measured():
    """What the report stage measured on four test images."""
    score = {"test_nll": 0.2, "test_ece": 0.1, "test_worst_class_accuracy": 0.5}
    return report.Test(
        scores={
            name: {"test_accuracy": 0.75, **score}
            | ({} if name == "teacher" else {"test_agreement": 0.8})
            for name in ROWS
        },
        student_minus={
            "teacher": counted(30, 34),
            "baselines/labels": counted(22, 2),
            "baselines/best_single": counted(10, 6),
        },
        ensemble_minus_teacher=counted(2, 14),
        over_constant={name: counted(120, 20) for name in ROWS},
        labels_N=[0, 1, 1, 0],
        predicted_N=[0, 1, 0, 0],
        confusion_CC=[[2, 0], [1, 1]],
        bins=[
            Bin(lower=8 / 15, upper=0.6, count=2, confidence=0.59, accuracy=0.5),
            Bin(lower=14 / 15, upper=1.0, count=2, confidence=0.975, accuracy=1.0),
        ],
    )


def test_the_table_has_a_row_for_every_network_in_the_experiments_order(artifacts, measured):
    rows = report.build(artifacts, NAMES, measured)["rows"]
    assert [row["name"] for row in rows] == ROWS
    roles = ["teacher", *["assistant"] * 2, *["ensemble"] * 2, "student", *["baseline"] * 2]
    assert [row["role"] for row in rows] == roles
    assert len({tuple(row) for row in rows}) == 1, "every row has the same columns"
    assert [row["test_agreement"] for row in rows] == [1.0, *[0.8] * 7]


def test_an_ensemble_is_as_large_as_its_members_and_scored_held_out(artifacts, measured):
    built = report.build(artifacts, NAMES, measured)
    weighted = next(row for row in built["rows"] if row["name"] == report.WEIGHTED)
    assert weighted["parameters"] == 400 + 200
    assert weighted["size_bytes"] == 4 * (400 + 200)
    assert weighted["val_accuracy"] == 0.925, "0.99 was measured on the rows it was found on"
    nll = {row["name"]: row["val_nll"] for row in built["rows"] if row["role"] == "ensemble"}
    assert nll == {report.UNIFORM: 0.27, report.WEIGHTED: 0.25}


def test_the_same_records_give_the_same_files_but_for_the_times(artifacts, measured, tmp_path):
    for latency, folder in ((1.0, tmp_path / "one"), (2.0, tmp_path / "two")):
        built = report.build(artifacts, NAMES, measured)
        report.write(folder, artifacts, built, NAMES, measured, {"student": latency})
    files = {p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()}
    differing = {
        str(file)
        for file in files
        if (tmp_path / "one" / file).read_bytes() != (tmp_path / "two" / file).read_bytes()
    }
    assert differing == {"latency.json", "report.md"}
    assert {str(file) for file in files} == {
        "report.json", "metrics.json", "latency.json", "report.md",
        "confusion.csv", "reliability.csv", "results.csv",
        "figures/confusion.png", "figures/curves.png", "figures/reliability.png",
        "figures/sizes.png",
        "figures/weights.png",
    }  # fmt: skip


def test_the_files_hold_what_was_measured(artifacts, measured, tmp_path):
    built = report.build(artifacts, NAMES, measured)
    report.write(tmp_path / "report", artifacts, built, NAMES, measured, {})

    def rows(name: str) -> list[dict[str, str]]:
        with (tmp_path / "report" / name).open(newline="") as file:
            return list(csv.DictReader(file))

    assert rows("confusion.csv")[2] == {"actual": "dog", "predicted": "cat"}
    assert [row["name"] for row in rows("results.csv")] == ROWS
    bins = [{key: float(cell) for key, cell in row.items()} for row in rows("reliability.csv")]
    assert [Bin(**row) for row in bins] == measured.bins, "those that test_ece is made of"
    drawn = {
        "confusion": figures.confusion(measured.confusion_CC, NAMES.class_names),
        "weights": figures.weights(built["weights"]),
    }
    for name, figure in drawn.items():
        figures.save(figure, tmp_path / "own.png")
        picture = (tmp_path / f"report/figures/{name}.png").read_bytes()
        assert picture == (tmp_path / "own.png").read_bytes()
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    assert metrics["student"]["test_accuracy"] == 0.75
    assert list(metrics) == ROWS
    assert "role" not in metrics["student"], "numbers alone"


def test_markdown_shows_the_numbers_of_the_records(artifacts, measured):
    text = report.to_markdown(
        report.build(artifacts, NAMES, measured), {"student": 0.123, "exports/onnx": 0.456}
    )
    table = [line for line in text.splitlines() if line[:1] == "|"]
    assert re.fullmatch(r"\|-+\|(-+:\|)+", table[1]), "numbers aligned right"
    assert len({len(line) for line in table[: 2 + len(ROWS)]}) == 1, "columns line up"
    lines = {line.split("|")[1].strip(): line for line in table}
    assert [cell.strip() for cell in lines["student"].split("|")[2:-1]] == [
        "90.00 %", "75.00 %", "100", "0.4 kB", "0.12 ms",
    ]  # fmt: skip
    assert "4.0 kB" in lines["teacher"]
    assert "0.700" in lines["chosen"]
    assert "600" in lines["chosen"]
    for shown in ("1.25 MB", "2.5e-06", "100.00 %", "87.50 % (90.00 %)", "0.46 ms"):
        assert shown in lines["artifacts/exports/onnx/model.onnx"]
    assert "of any output: logits, or probabilities if the file takes raw images" in text
    assert "nan" not in text
    assert "None" not in text


def test_what_cross_validation_took_from_the_search_is_said(artifacts, measured):
    said = "ended at large 0.900, small 0.100; cross-validation moved it 50.00 % of the way"
    built = report.build(artifacts, NAMES, measured)
    assert said in report.to_markdown(built)
    built["weights"]["shrinkage"] = 0.0
    assert "ended at" not in report.to_markdown(built)


def test_findings_call_a_difference_one_only_beyond_chance(artifacts, measured):
    student, baselines, ensemble, gain = report.build(artifacts, NAMES, measured)["findings"]
    assert "75.00 % on 4 test images" in student
    assert "10.0 times as many parameters" in student
    assert "cannot be told apart from the teacher (-1.00 +- 2.00 points)" in student
    assert (
        "The student is better than labels, and cannot be told apart from best single."
        in baselines
    )
    assert "labels +5.00 +- 1.20 points" in baselines
    assert "is worse than the teacher (-3.00 +- 0.99 points)" in ensemble
    assert "by -0.0200 +- 0.0050 and its accuracy by +1.00 +- 0.00 points" in gain
    assert gain.endswith("in NLL, a gain.")


def test_four_images_gained_and_none_lost_are_no_clear_difference():
    one = counted(4, 0, 180)
    assert one.difference > 2 * one.standard_error
    assert (one.gained, one.lost) == (4, 0)
    assert told_apart({"teacher": asdict(one)}) == {"teacher": 0}, "p = 1/8"
    assert told_apart({"teacher": {"gained": 1, "lost": 8}}) == {"teacher": -1}, "p = 5/128"


def test_differences_of_one_kind_share_their_chance_of_a_false_one():
    pairs = {"a": (9, 0), "b": (0, 7), "c": (6, 0), "d": (0, 6), "e": (0, 0)}
    compared = {name: {"gained": g, "lost": lost} for name, (g, lost) in pairs.items()}
    # p * 5 = 0.02, then p * 4 = 0.0625.
    assert told_apart(compared) == {"a": 1, "b": 0, "c": 0, "d": 0, "e": 0}
    del compared["c"], compared["d"]
    assert told_apart(compared) == {"a": 1, "b": -1, "e": 0}
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(1000):
        counts = rng.binomial(40, 0.5, size=7)
        compared = {str(i): {"gained": n, "lost": 40 - n} for i, n in enumerate(counts.tolist())}
        false += any(told_apart(compared).values())
    assert false / 1000 < LEVEL + 3 * (LEVEL / 1000) ** 0.5


def test_networks_that_learned_nothing_are_named_first(artifacts, measured):
    over = {
        **measured.over_constant,
        "teacher": counted(0, 0),
        "assistants/large": counted(90, 70),
        "assistants/small": counted(20, 100),
    }
    built = report.build(artifacts, NAMES, dataclasses.replace(measured, over_constant=over))
    assert built["findings"][0] == (
        "On these images the accuracy is not significantly above that of always naming their most "
        "frequent class: teacher, assistants/large, assistants/small. "
        "Train longer, or test on more images: what follows says little."
    )
    assert built["findings"][0] in report.to_markdown(built)


@pytest.mark.parametrize(
    ("nll", "ending"),
    [
        (-0.02, "in NLL, a loss."),
        (0.01, "in NLL, no difference that these images could show."),
        (0.0, "in NLL, no difference that these images could show."),
    ],
)
def test_weights_that_gained_nothing_are_said_to_have_gained_nothing(
    artifacts, measured, nll, ending
):
    path = artifacts / "weights/weights.json"
    record = json.loads(path.read_text())
    record["gain"]["over_uniform"]["nll"] = nll
    write(path, record)
    assert report.build(artifacts, NAMES, measured)["findings"][-1].endswith(ending)


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("teacher/metrics.json", "dvc repro teacher`"),
        ("assistants/large/metrics.json", "dvc repro assistants@large`"),
        ("exports/onnx/parity.json", "dvc repro exports@onnx`"),
        ("weights/weights.json", "dvc repro weights`"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "damaged", "not a record"])
def test_a_record_that_cannot_be_read_is_named_with_the_stage_that_makes_it(
    artifacts, measured, missing, remedy, damage
):
    path = artifacts / missing
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("{" if damage == "damaged" else "[]")
    with pytest.raises(ConfigError, match=f"{missing}.*{damage}.*{remedy}"):
        report.build(artifacts, NAMES, measured)


def test_a_record_without_a_figure_is_named(artifacts, measured):
    write(artifacts / "student/metrics.json", {"val_accuracy": 0.5})
    with pytest.raises(ConfigError, match=r"student/metrics\.json has no 'val_nll'"):
        report.build(artifacts, NAMES, measured)


def test_a_row_without_test_scores_is_named(artifacts, measured):
    scores = {name: s for name, s in measured.scores.items() if name != "baselines/labels"}
    with pytest.raises(ConfigError, match="no test scores for baselines/labels"):
        report.build(artifacts, NAMES, dataclasses.replace(measured, scores=scores))


def test_an_experiment_without_baselines_and_exports_has_a_report(artifacts, measured):
    names = dataclasses.replace(NAMES, baselines=[], exports=[])
    compared = {"teacher": measured.student_minus["teacher"]}
    test = dataclasses.replace(measured, student_minus=compared)
    built = report.build(artifacts, names, test)
    assert len(built["findings"]) == 3
    assert "## Exports" not in report.to_markdown(built)
