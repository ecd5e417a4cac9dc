"""ONNX: one .onnx file for ONNX Runtime and anything else that reads the format.

Shapes: B batch, C classes.
"""

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kd.component import component
from kd.disk import temporary
from kd.exporters.files import (
    Runner,
    counted,
    exporting,
    ignoring,
    in_canonical_memory,
    readable,
    require_packages,
    write,
)
from kd.exporters.format import Tolerance
from kd.exporters.int8 import Int8
from kd.exporters.trained import Trained

NETWORK = "'network'"
"""How torch's exporter writes the scope of kd.exporters.trained.FromPicture.network."""

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it would report its use to Microsoft


@component
class Onnx:
    """A graph from `image` to `logits`, or to `probabilities`."""

    kind: Literal["onnx"] = "onnx"
    precision: Literal["fp32", "int8"] = "fp32"
    """int8 is a static QDQ graph with one weight scale per output channel."""
    int8: Int8 = Int8()
    """Quantisation settings; used only if the precision is int8."""
    activations: Literal["u8", "s8"] = "u8"
    """Type in int8 files; x86 CPUs are fastest with u8 (s8 was up to 2.8 times slower)."""
    reduce_range: bool = True
    """Use 7-bit weights in int8 files: x86 CPUs without VNNI add two u8 x s8 products in 16 bits,
    which 8-bit weights overflow (20 dB measured instead of 36 dB; 7 bits give 32 dB).  Turn it
    off for files that only phones and newer servers will run."""
    picture_input: bool = False
    """Take pictures (uint8, NHWC), return probabilities; off: normalised images and logits."""
    dynamic_batch: bool = False
    """Accept any batch size.  Off, because the Core ML and NNAPI execution providers on phones
    want fixed shapes; turn it on for a server."""
    tolerance: Tolerance = Tolerance()
    """How far outputs may differ from the eager network's before the file is refused."""

    suffix: ClassVar[str] = ".onnx"
    runs_here: ClassVar[bool] = True

    def check(self) -> None:
        """Raise a ConfigError if a package is missing."""
        require_packages("onnx", "onnxscript", "onnxruntime")

    def export(self, trained: Trained, path: Path) -> None:
        """Write the network to `path`; its description, labels too, goes to `metadata_props`.

        Raises:
            ConfigError: a package is not installed, the network cannot be exported, or the
                precision is int8 and there are no calibration pictures.
        """
        self.check()
        images = None
        if self.precision == "int8":
            images = trained.calibration(self.int8.calibration_images, self.picture_input)
        with exporting("an ONNX graph"):
            model = self._graph(trained)
            outside = list(_outside(model))
            _forget_origin(model)
            if images is not None:
                model = self._quantised(model, images, outside)
            for key, text in trained.description().items():
                model.metadata_props.add(key=key, value=text)
        write(path, model.SerializeToString(deterministic=True))

    def _graph(self, trained: Trained) -> Any:
        image = in_canonical_memory(trained.example(self.picture_input))
        # Two images, because torch.export treats a size of 1 as constant.
        images = torch.cat([image, image]) if self.dynamic_batch else image
        program = torch.onnx.export(
            trained.served(self.picture_input),
            (images,),
            dynamo=True,
            verbose=False,  # else it prints progress to stdout
            input_names=["image"],
            output_names=["probabilities" if self.picture_input else "logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")} if self.dynamic_batch else {},),
        )
        assert program is not None  # None only if torch itself writes the file
        return program.model_proto

    def _quantised(self, model: Any, images: Tensor, outside: list[str]) -> Any:
        """Quantise the graph's weights and activations to int8, except for the nodes `outside`.

        Args:
            model: The graph.
            images: Calibration images, for the ranges of activations.
            outside: Names of the nodes left in floating point.
        """
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Calibration(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.rest = iter(in_canonical_memory(images).split(1))

            def get_next(self) -> dict[str, Any] | None:
                image = next(self.rest, None)
                return None if image is None else {"image": image.numpy()}

        with temporary() as folder, ignoring("Please consider to run pre-processing"):
            names = ("fp32", "prepared", "int8")
            fp32, prepared, made = (Path(folder) / f"{name}.onnx" for name in names)
            onnx.save(model, fp32)
            quant_pre_process(fp32, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                made,
                Calibration(),
                per_channel=True,
                activation_type=QuantType.QUInt8 if self.activations == "u8" else QuantType.QInt8,
                weight_type=QuantType.QInt8,
                reduce_range=self.reduce_range,
                nodes_to_exclude=outside,
            )
            quantised = onnx.load(made)
        used = {node.domain for node in quantised.graph.node}
        for entry in [each for each in quantised.opset_import if each.domain not in used]:
            quantised.opset_import.remove(entry)  # domains that the quantiser adds unused
        return quantised

    def load(self, path: Path, threads: int = 1) -> Runner:
        """Load the file at `path` in ONNX Runtime on the CPU.

        Raises:
            ConfigError: the package is not installed, or the file is not an ONNX model.
        """
        require_packages("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        data = path.read_bytes()
        with readable(path, "an ONNX model"):
            session = onnxruntime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"]
            )
            (image,) = session.get_inputs()
            batch, first, second, third = image.shape

        def run(images: Tensor) -> Tensor:
            (outputs_BC,) = session.run(None, {image.name: images.numpy()})
            return torch.from_numpy(outputs_BC)

        pictures = image.type == "tensor(uint8)"
        return Runner(run, (first, second, third), batch != 1, threads, pictures)

    def inspect(self, path: Path) -> dict[str, Any]:
        """Describe the file at `path`.

        Returns:
            inputs and outputs (shape by name, "batch" for any size), operators (number of nodes
            of each), opset and ir_version (what a runtime must support), labels, metadata, and
            the runtime that read it.
        """
        require_packages("onnx", "onnxruntime")
        import onnx

        data = path.read_bytes()
        with readable(path, "an ONNX model"):
            model = onnx.load_from_string(data)
            onnx.checker.check_model(model)
            metadata = {entry.key: entry.value for entry in model.metadata_props}
        return {
            "inputs": {value.name: _shape(value) for value in model.graph.input},
            "outputs": {value.name: _shape(value) for value in model.graph.output},
            "operators": counted(node.op_type for node in model.graph.node),
            "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
            "ir_version": model.ir_version,
            "labels": json.loads(metadata["labels"]),
            "metadata": metadata,
            "runtime": f"ONNX Runtime {version('onnxruntime')}",
        }


def _shape(value: Any) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def _outside(model: Any) -> Iterator[str]:
    """Names of the nodes around the network: preprocessing and the final softmax."""
    scopes = {
        node.name: {entry.key: entry.value for entry in node.metadata_props}.get(
            "pkg.torch.onnx.name_scopes", ""
        )
        for node in model.graph.node
    }
    if any(NETWORK in scope for scope in scopes.values()):
        yield from (name for name, scope in scopes.items() if NETWORK not in scope)


def _forget_origin(message: Any) -> None:
    """Remove the origin of each node, recursively below `message`.

    The exporter stores a stack trace with each node: its paths would make the file differ
    between machines, and should not be published.
    """
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for below in [value] if hasattr(value, "ListFields") else value:
                _forget_origin(below)
