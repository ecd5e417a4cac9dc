"""Core ML: one .mlpackage for iPhones and Macs, converted on Linux.

Shapes: B batch, C classes, H W image.
"""

import gc
import importlib.util
import io
import json
import logging
import os
import shutil
import traceback
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kd.component import ConfigError, component
from kd.disk import remove, temporary
from kd.exporters.files import (
    AT_IMPORT,
    Runner,
    captured,
    counted,
    exporting,
    for_export,
    ignoring,
    readable,
    require_packages,
    torch_threads,
)
from kd.exporters.format import Tolerance
from kd.exporters.mil import Program
from kd.exporters.trained import Normalise, Trained

INSIDE = Path("Data/com.apple.CoreML")
"""Where the specification and weights are inside a package."""


@component
class CoreML:
    """A program that takes one image at a time, for iOS 16, macOS 13 and later."""

    kind: Literal["coreml"] = "coreml"
    precision: Literal["fp16", "fp32", "int8"] = "fp16"
    """fp16 is what Apple's Neural Engine computes in; int8 stores the weights in 8 bits with one
    scale per output channel, and computes in fp16 (no calibration needed)."""
    picture_input: bool = False
    """Export an image classifier for the Vision framework: an image in, the label and a table of
    probabilities out; off: normalised images in, logits out."""
    tolerance: Tolerance = Tolerance()
    """How far outputs may differ from the eager network's before the file is refused."""

    suffix: ClassVar[str] = ".mlpackage"
    runs_here: ClassVar[bool] = False
    """Core ML itself runs only on Apple devices."""
    int8: ClassVar[None] = None

    def check(self) -> None:
        """Raise a ConfigError if coremltools is not installed, or lacks its compiled parts."""
        require_packages("coremltools")
        found = importlib.util.find_spec("coremltools")
        assert found
        assert found.origin
        if not any(Path(found.origin).parent.glob("libmilstoragepython*")):
            raise ConfigError(
                "coremltools has no wheel for this Python, and what pip builds instead cannot "
                "write files: use an older Python, such as 3.11"
            )

    def export(self, trained: Trained, path: Path) -> None:
        """Write the network to the folder `path`, completely or not at all.

        Raises:
            ConfigError: the package is not installed, or the network cannot be exported.
        """
        self.check()
        with _coremltools(), exporting("a Core ML program"), temporary() as folder:
            saved, staged = Path(folder) / "saved.mlpackage", path.with_name(f".{path.name}")
            try:
                self._save(trained, saved)
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # they hold coremltools' folders
                raise
            finally:
                gc.collect()  # its temporary folders warn when collected; silenced in this block
            _make_reproducible(saved)
            remove(staged)
            shutil.move(saved, staged)
        remove(path)
        os.replace(staged, path)

    def _save(self, trained: Trained, path: Path) -> None:
        made = self._converted(trained)
        made.user_defined_metadata.update(trained.description())
        made.save(str(path))

    def _converted(self, trained: Trained) -> Any:
        import coremltools
        import numpy
        from coremltools import optimize
        from coremltools.converters.mil import Builder

        served: nn.Module = for_export(trained.module)
        example = trained.example(picture_input=False)
        given = {"name": "image", "shape": tuple(example.shape)}
        image, classes = coremltools.TensorType(**given, dtype=numpy.float32), None
        outputs = [coremltools.TensorType(name="logits", dtype=numpy.float32)]
        if self.picture_input:
            served = _FromPixels(served, trained)
            colours = coremltools.colorlayout
            layout = colours.GRAYSCALE if len(trained.mean) == 1 else colours.RGB
            image = coremltools.ImageType(**given, color_layout=layout)
            outputs = [coremltools.TensorType(name="probabilities", dtype=numpy.float32)]
            classes = coremltools.ClassifierConfig(
                list(trained.class_names), "label", "probabilities"
            )
        Builder.name_count.clear()  # else names depend on how many conversions came before
        made = coremltools.convert(
            captured(served, example).run_decompositions({}),  # coremltools requires this
            inputs=[image],
            outputs=outputs,
            classifier_config=classes,
            compute_precision=(
                coremltools.precision.FLOAT32
                if self.precision == "fp32"
                else coremltools.precision.FLOAT16
            ),
            minimum_deployment_target=coremltools.target.iOS16,
            skip_model_load=True,
        )
        if self.precision != "int8":
            return made
        symmetric = optimize.coreml.OpLinearQuantizerConfig(
            mode="linear_symmetric", weight_threshold=0
        )
        config = optimize.coreml.OptimizationConfig(global_config=symmetric)
        return optimize.coreml.linear_quantize_weights(made, config)

    def load(self, path: Path, threads: int = 1) -> Runner:
        """Load the program at `path`, with its weights, in the reference interpreter (mil.py).

        Core ML itself runs only on Apple devices.

        Raises:
            ConfigError: the package is not installed, the file is not a Core ML program, or it
                has an operation that the interpreter does not support.
        """
        specification, function = _read(path)
        program = Program(function)
        pictures = specification.description.input[0].type.WhichOneof("Type") == "imageType"
        _, channels, height, width = _input_shape(specification)

        def run(images: Tensor) -> Tensor:
            with torch_threads(threads), torch.inference_mode():
                return program(images.permute(0, 3, 1, 2).float() if pictures else images)

        shape = (height, width, channels) if pictures else (channels, height, width)
        return Runner(run, shape, any_batch=False, threads=threads, pictures=pictures)

    def inspect(self, path: Path) -> dict[str, Any]:
        """Describe the package at `path`.

        Returns:
            inputs and outputs (shape by name; pictures as H, W, channels, though Core ML takes an
            image), operators (count of each), specification_version, labels, metadata, runtime,
            and verified_by: what was run instead of Core ML.
        """
        specification, function = _read(path)
        description = specification.description
        pictures = description.input[0].type.WhichOneof("Type") == "imageType"
        metadata = dict(sorted(description.metadata.userDefined.items()))
        batch, channels, height, width = _input_shape(specification)
        labels = json.loads(metadata["labels"])
        output = "probabilities" if pictures else "logits"
        operators = (op.op_type for op in function.operations if op.op_type != "const")
        image = [batch, height, width, channels] if pictures else [batch, channels, height, width]
        return {
            "inputs": {"image": image},
            "outputs": {output: [batch, len(labels)]},
            "operators": counted(operators),
            "specification_version": specification.specificationVersion,
            "labels": labels,
            "metadata": metadata,
            "runtime": "Core ML, only on Apple devices: not run here",
            "verified_by": "the specification was read back from the file and its program "
            "evaluated, with its own weights, by a reference interpreter (torch) that rounds "
            "each result to the program's types",
        }


class _FromPixels(nn.Module):
    """Pixels 0 to 255, in Core ML's image layout (B, channels, H, W), to probabilities."""

    mean_C11: Tensor
    scale_C11: Tensor

    def __init__(self, network: nn.Module, trained: Trained) -> None:
        super().__init__()
        self.network = network
        constants = Normalise(trained.mean, trained.std)
        self.register_buffer("mean_C11", constants.mean[:, None, None])
        self.register_buffer("scale_C11", constants.scale[:, None, None])

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        logits_BC: Tensor = self.network((pixels_BCHW - self.mean_C11) * self.scale_C11)
        return logits_BC.softmax(1)


def _read(path: Path) -> tuple[Any, Any]:
    """Read a package's specification and its main function."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    require_packages("coremltools")
    with _coremltools(), readable(path, "a Core ML package"):
        from coremltools.converters.mil.frontend.milproto.load import load
        from coremltools.proto import Model_pb2

        specification = Model_pb2.Model()
        specification.ParseFromString((path / INSIDE / "model.mlmodel").read_bytes())
        program = load(
            specification,
            specification.specificationVersion,
            file_weights_dir=str(path / INSIDE / "weights"),
        )
        return specification, program.functions["main"]


def _input_shape(specification: Any) -> tuple[int, ...]:
    (image,) = specification.description.input
    if image.type.WhichOneof("Type") == "imageType":
        kind = image.type.imageType
        grey = kind.colorSpace == kind.ColorSpace.Value("GRAYSCALE")
        return 1, 1 if grey else 3, kind.height, kind.width
    return tuple(image.type.multiArrayType.shape)


def _make_reproducible(package: Path) -> None:
    """Remove the date, and derive the parts' random UUIDs from their names instead."""
    from coremltools.proto import Model_pb2

    for extra in package.glob("*_mapping.json"):  # debug information with random UUIDs
        extra.unlink()
    path = package / INSIDE / "model.mlmodel"
    specification = Model_pb2.Model()
    specification.ParseFromString(path.read_bytes())
    for key in list(specification.description.metadata.userDefined):
        if key.startswith("com.github.apple.coremltools.") and key.endswith("date"):
            del specification.description.metadata.userDefined[key]
    path.write_bytes(specification.SerializeToString(deterministic=True))
    path.chmod(0o644)
    parts = {"model.mlmodel": "Specification", "weights": "Weights"}
    entries = {
        str(uuid.uuid5(uuid.NAMESPACE_URL, f"com.apple.CoreML/{name}")): {
            "author": "com.apple.CoreML",
            "description": f"CoreML Model {description}",
            "name": name,
            "path": f"com.apple.CoreML/{name}",
        }
        for name, description in parts.items()
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": next(iter(entries)),
    }
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n")


@contextmanager
def _coremltools() -> Iterator[None]:
    """Import and call coremltools without its progress bars and version warnings."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with redirect_stderr(io.StringIO()), ignoring(*AT_IMPORT, "Implicitly cleaning up"):
        # coremltools calls functions that it has itself deprecated.
        warnings.filterwarnings("ignore", module=r"coremltools\.")
        yield
