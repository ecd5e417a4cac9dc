"""What a report's numbers mean, in sentences; insignificant differences are called none."""

from collections.abc import Mapping
from typing import Any

from kd.evaluate import holm, mcnemar

LEVEL = 0.05
"""If no accuracies differ, the chance, at most, that the report calls any of its comparisons of
one kind a difference."""
CLEAR = 2.0
"""Standard errors that a difference in NLL must exceed before the report calls it one."""
VERDICTS = {1: "is better than", -1: "is worse than", 0: "cannot be told apart from"}
"""By the sign of a clear difference."""


def findings(report: Mapping[str, Any]) -> list[str]:
    """What the numbers mean, in sentences; insignificant differences are called none."""
    rows = {row["name"]: row for row in report["rows"]}
    student, teacher = rows["student"], rows["teacher"]
    against = report["student_minus"]["teacher"]
    verdict = VERDICTS[told_apart(report["student_minus"])["teacher"]]
    return [
        *_untrained(report),
        f"The student reaches {percent(student['test_accuracy'])} on {report['num_test']} test "
        f"images, the teacher {percent(teacher['test_accuracy'])} with "
        f"{teacher['parameters'] / student['parameters']:.1f} times as many parameters; on these "
        f"images the student {verdict} the teacher ({_points(against)}).",
        *_against_baselines(report),
        _against_teacher(report),
        _gain(report["weights"]["gain"]["over_uniform"], report["weights"]["num_val"]),
    ]


def told_apart(compared: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The sign of each significant difference in accuracy, 0 for any other.

    McNemar's exact test, two-sided, with Holm's correction for this many comparisons.

    Args:
        compared: By row: gained and lost.
    """
    chances = {
        name: 2 * mcnemar(max(one["gained"], one["lost"]), min(one["gained"], one["lost"]))
        for name, one in compared.items()
    }
    signs = {name: 1 if one["gained"] > one["lost"] else -1 for name, one in compared.items()}
    return {name: signs[name] * (p <= LEVEL) for name, p in holm(chances).items()}


def _untrained(report: Mapping[str, Any]) -> list[str]:
    """Name the networks that are no better than a constant answer."""
    named = [name for name, sign in told_apart(report["over_constant"]).items() if sign < 1]
    if not named:
        return []
    return [
        "On these images the accuracy is not significantly above that of always naming their most "
        f"frequent class: {', '.join(named)}. Train longer, or test on more images: what follows "
        "says little."
    ]


def _against_baselines(report: Mapping[str, Any]) -> list[str]:
    """The student against each baseline: better, worse or no difference."""
    shown = {
        name: name.partition("/")[2].replace("_", " ")
        for name in report["student_minus"]
        if name.startswith("baselines/")
    }
    if not shown:
        return []
    parts = [f"{text} {_points(report['student_minus'][name])}" for name, text in shown.items()]
    signs = told_apart(report["student_minus"])
    verdicts = [
        f"{phrase} {', '.join(group)}"
        for sign, phrase in VERDICTS.items()
        if (group := [text for name, text in shown.items() if signs[name] == sign])
    ]
    return [
        "Against the same network trained differently, on the same test images (student minus "
        f"baseline, +- standard error): {', '.join(parts)}. "
        f"The student {', and '.join(verdicts)}."
    ]


def _against_teacher(report: Mapping[str, Any]) -> str:
    one = report["ensemble_minus_teacher"]
    verdict = VERDICTS[told_apart({"teacher": one})["teacher"]]
    return (
        "On the same test images, the weighted ensemble of assistants "
        f"{verdict} the teacher ({_points(one)})."
    )


def _gain(gain: Mapping[str, float], num_val: int) -> str:
    """What the weights gain on images that they were not found on."""
    word = "no difference that these images could show"
    if abs(gain["nll"]) > CLEAR * gain["nll_se"]:
        word = "a gain" if gain["nll"] > 0 else "a loss"
    return (
        f"Held out on {num_val} validation images, the weights change the uniform ensemble's NLL "
        f"by {-gain['nll']:+.4f} +- {gain['nll_se']:.4f} and its accuracy by "
        f"{100 * gain['accuracy']:+.2f} +- {100 * gain['accuracy_se']:.2f} points: in NLL, "
        f"{word}."
    )


def percent(share: float) -> str:
    """A share in [0, 1], to be read."""
    return f"{100 * share:.2f} %"


def _points(paired: Mapping[str, float]) -> str:
    return f"{100 * paired['difference']:+.2f} +- {100 * paired['standard_error']:.2f} points"
