"""preprocessing.json and labels.txt: how to get from pictures to inputs, from outputs to names."""

from collections.abc import Mapping, Sequence
from typing import Any

from kd.component import Refused
from kd.manifest import Manifest

FORMAT = 1
MADE_BY = (
    "turned upright (EXIF); transparency composited over white; {}; largest centre square "
    "cropped; resized by antialiased bilinear (Pillow's BILINEAR) unless already of this size"
)
"""How training prepares a picture (kd.data.pictures); {} is the conversion of colours."""


def preprocessing(parity: Mapping[str, Any], student: Manifest) -> dict[str, Any]:
    """The content of preprocessing.json.

    Args:
        parity: The export's record: file, and shape by name of its one input and one output.  A
            file with the output "probabilities" takes pictures; with "logits", normalised images.
        student: The manifest of the network that was exported.
    """
    ((input_name, input_shape),) = parity["inputs"].items()
    ((output_name, output_shape),) = parity["outputs"].items()
    inside = output_name == "probabilities"
    return {
        "format": FORMAT,
        "file": parity["file"],
        "picture": {
            "height": student.image_size,
            "width": student.image_size,
            "channels": student.channels,
            "colour_order": "grey" if student.channels == 1 else "RGB",
            "type": "uint8",
            "layout": "NHWC",
            "made_by": MADE_BY.format(
                "0.299 R + 0.587 G + 0.114 B" if student.channels == 1 else "RGB"
            ),
        },
        "inside_the_graph": inside,
        "formula": "(pixel / 255 - mean) / std, per channel",
        "mean": list(student.mean),
        "std": list(student.std),
        "input": {
            "name": input_name,
            "shape": input_shape,
            **_taken(inside, parity["file"]),
        },
        "output": {
            "name": output_name,
            "shape": output_shape,
            "type": "float32",
            "meaning": "probabilities" if inside else "logits",
        },
    }


def _taken(inside: bool, file: str) -> dict[str, str]:
    """Type and layout of the input."""
    if not inside:
        return {"type": "float32", "layout": "NCHW"}
    if file.endswith(".mlpackage"):  # Core ML takes the system's image types
        return {"type": "image", "layout": "CGImage or CVPixelBuffer"}
    return {"type": "uint8", "layout": "NHWC"}


def labels(class_names: Sequence[str], form: Mapping[str, Any]) -> str:
    """The content of labels.txt: one class per line, in the order of the file's outputs.

    Raises:
        Refused: there are more or fewer names than outputs, or a name is not a single line.
    """
    output = form["output"]
    if output["shape"][-1] != len(class_names):
        raise Refused(
            f"{form['file']} gives {output['name']} of shape {output['shape']}, "
            f"but there are {len(class_names)} class names; nothing was published"
        )
    for name in class_names:
        if name.splitlines() != [name]:
            raise Refused(f"the class name {name!r} is not one line, as labels.txt needs it")
    return "".join(f"{name}\n" for name in class_names)
