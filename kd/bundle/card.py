"""The model card: what the file is, how accurate, its limits, and how to load it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.bundle.loading import loading
from kd.manifest import Manifest

FENCES = {"Kotlin": "kotlin", "Swift": "swift", "Python": "python", "C++": "cpp"}


def card(
    parity: Mapping[str, Any],
    student: Manifest,
    data: Mapping[str, Any],
    form: Mapping[str, Any],
) -> str:
    """The text of MODEL_CARD.md; it has no time, host or path.

    Args:
        parity: The record of the file's comparison with the network.
        student: The network's manifest.
        data: The record of its training data.
        form: The content of preprocessing.json.
    """
    sections = [
        f"# {form['file']}: a classifier of {student.num_classes} classes",
        _what(parity, student),
        "## Use",
        _use(form),
        *_samples(form),
        "## Accuracy",
        _how_good(parity),
        "## Training data and teachers",
        _origin(student, data),
        "## Limits",
        _limits(parity, data),
    ]
    return "\n\n".join(sections) + "\n"


def _what(parity: Mapping[str, Any], student: Manifest) -> str:
    model = ", ".join(f"{key} {value}" for key, value in student.model.items() if key != "kind")
    return (
        f"A student network ({student.model['kind']}: {model}), distilled for phones and exported "
        f"in {parity['precision']} as one file of {parity['size_bytes']:,} bytes.\n\n"
        f"SHA-256: `{parity['sha256']}`; `sha256sum --check SHA256SUMS` checks the whole folder."
    )


def _use(form: Mapping[str, Any]) -> str:
    picture, given, found = form["picture"], form["input"], form["output"]
    side, channels = picture["height"], picture["channels"]
    prepared = (
        f"Prepare each image as {side} x {side} pixels with {channels} "
        f"channel{'s' * (channels > 1)} ({picture['colour_order']}), uint8, by these steps: "
        f"{picture['made_by']}."
    )
    normalised = (
        "The model normalises the pixels itself."
        if form["inside_the_graph"]
        else f"Then normalise: {form['formula']}, with mean {form['mean']} and std "
        f"{form['std']}, channels first."
    )
    return (
        f"{prepared} {normalised}\n\n"
        "| | name | type | shape |\n| --- | --- | --- | --- |\n"
        f"| input | `{given['name']}` | {given['type']}, {given['layout']} | {given['shape']} |\n"
        f"| output | `{found['name']}` | {found['type']} | {found['shape']} |\n\n"
        "Outputs are in the order of labels.txt. Programs find all this in preprocessing.json."
    )


def _samples(form: Mapping[str, Any]) -> list[str]:
    shown = []
    for language, lines in loading(Path(form["file"]).suffix, form).items():
        shown.append(f"### {language}")
        one_line = "\n" not in lines  # a sentence, not code
        shown.append(lines if one_line else f"```{FENCES[language]}\n{lines}\n```")
    return shown


def _how_good(parity: Mapping[str, Any]) -> str:
    accuracy, num = parity["val_accuracy"], parity["num_images"]
    error = math.sqrt(accuracy * (1 - accuracy) / num)
    unlike = parity.get("undelegated")
    left = ", ".join(f"{name} ({calls})" for name, calls in (unlike or {}).items())
    bench = f" `kd bench {parity['file']}` measures the file on a computer."
    if parity.get("verified_by"):  # `kd bench` refuses files whose own runtime cannot run here
        bench = ""
    return (
        f"{_verified(parity)}\n\n"
        "| | |\n| --- | --- |\n"
        f"| runtime | {parity['runtime']} |\n"
        f"| accuracy | {accuracy:.4f} ± {error:.4f} (n = {num}) |\n"
        f"| accuracy before export | {parity['eager_val_accuracy']:.4f} |\n"
        f"{_fine_tuned(parity)}"
        f"| same class as before export | {parity['top1_agreement']:.4f} |\n"
        f"| output difference: largest, mean | {parity['max_abs']:.3g}, "
        f"{parity['mean_abs']:.3g} |\n"
        f"| size in bytes | {parity['size_bytes']:,} |\n"
        + (
            f"| operators not accelerated (calls) | {left or 'none'} |\n"
            if unlike is not None
            else ""
        )
        + "\n± is one binomial standard error, from the sample of images; it does not cover "
        "variation between training seeds.\n"
        "Latency and memory, where measured, are in benchmark.json. For a phone's, measure on the "
        f"phone.{bench}"
    )


def _fine_tuned(parity: Mapping[str, Any]) -> str:
    """Rows for both ways to int8, if both were tried."""
    if "chosen" not in parity:
        return ""
    ways = {"ptq": "calibrated only", "qat": "fine-tuned with simulated int8"}
    return "".join(
        f"| {words}{' (this file)' * (way == parity['chosen'])} "
        f"| {parity[f'{way}_val_accuracy']:.4f} |\n"
        for way, words in ways.items()
    )


def _verified(parity: Mapping[str, Any]) -> str:
    """A sentence that says how the figures were measured."""
    stand_in = parity.get("verified_by")
    if stand_in:
        return f"**Not run in its own runtime.** Instead, on every validation image, {stand_in}:"
    return "Measured in its own runtime on every validation image:"


def _origin(student: Manifest, data: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{name} {split['count']:,}" for name, split in data["splits"].items())
    taught = "It was trained on labels alone."
    if student.teachers:
        rows = "".join(
            f"| {teacher.name} | {weight:.4f} | `{teacher.sha256[:16]}` |\n"
            for teacher, weight in zip(student.teachers, student.weights_K, strict=True)
        )
        taught = (
            f"Its teachers, averaged by weight as {student.mixing}:\n\n"
            f"| teacher | weight | SHA-256 (start) |\n| --- | --- | --- |\n{rows}"
        )
    return (
        f"Data set `{data['dataset']['kind']}` (hash `{data['data_hash'][:16]}`), images: "
        f"{counts}.\n\n{taught}\nMethod, recipe, seed and code are in student.json; "
        "`kd lineage FILE` traces them in the project's workspace."
    )


def _limits(parity: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    names = data["class_names"]
    classes = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return (
        f"- It knows {len(names)} classes ({classes}) and assigns one of them to every "
        "image, even to one that shows none.\n"
        "- The validation images above also guided its selection, so the accuracy on them is "
        "slightly optimistic; the project's report has the test accuracy.\n"
        "- Its probabilities are not calibrated.\n"
        "- It was not tested on images unlike its training data (other cameras, light, crops).\n"
        "- It has no licence of its own: the licences of its training images, and of any "
        "pretrained weights, apply."
    )
