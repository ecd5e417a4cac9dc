"""ONNX: one .onnx file for ONNX Runtime and whatever else reads the format.

Shapes: B batch, C classes, H W image.
"""

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kd.component import component
from kd.exporters.files import (
    Runner,
    for_export,
    in_canonical_memory,
    readable,
    require_packages,
    write,
)
from kd.exporters.parity import Tolerance


@component
class Onnx:
    """An fp32 graph from `images` to `logits`."""

    kind: Literal["onnx"] = "onnx"
    dynamic_batch: bool = False
    """Take any number of images at once.  Off, because the Core ML and NNAPI providers of phones
    want fixed shapes; on for a server."""
    tolerance: Tolerance = Tolerance()
    """How far from eager the file may be and still be published."""

    suffix: ClassVar[str] = ".onnx"

    def export(self, module: nn.Module, example_BCHW: Tensor, path: Path) -> None:
        """Write `module` to `path`.

        Args:
            module: The trained network; neither moved nor changed.
            example_BCHW: Images as the network takes them; only their shape matters here.
            path: The file to write, whole or not at all.

        Raises:
            ConfigError: a package of the extra `exports` is not installed.
        """
        require_packages("onnx", "onnxscript")
        image_1CHW = in_canonical_memory(example_BCHW[:1].to("cpu", torch.float32))
        # Two images, because torch.export takes a size of one for a constant.
        images_BCHW = image_1CHW.repeat(2, 1, 1, 1) if self.dynamic_batch else image_1CHW
        batch = {0: torch.export.Dim("batch")} if self.dynamic_batch else {}
        program = torch.onnx.export(
            for_export(module),
            (images_BCHW,),
            dynamo=True,
            verbose=False,  # else it prints its progress on stdout
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=(batch,),
        )
        assert program is not None  # None only where torch itself writes the file
        model = program.model_proto
        _forget_origin(model)
        write(path, model.SerializeToString(deterministic=True))

    def load(self, path: Path, threads: int = 1) -> Runner:
        """The file at `path` in ONNX Runtime on the CPU.

        Raises:
            ConfigError: the package is not installed, or the file is not a model.
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
            batch, channels, height, width = session.get_inputs()[0].shape

        def run(images_BCHW: Tensor) -> Tensor:
            (logits_BC,) = session.run(["logits"], {"images": images_BCHW.numpy()})
            return torch.from_numpy(logits_BC)

        return Runner(run, (channels, height, width), any_batch=batch != 1, threads=threads)

    def inspect(self, path: Path) -> dict[str, Any]:
        """What is in the file at `path`.

        Returns:
            inputs and outputs (shape by name, "batch" for any number), operators (number of
            nodes of each), opset and ir_version (what a runtime must support).
        """
        require_packages("onnx")
        import onnx

        data = path.read_bytes()
        with readable(path, "an ONNX model"):
            model = onnx.load_from_string(data)
            onnx.checker.check_model(model)
        return {
            "inputs": {value.name: _shape(value) for value in model.graph.input},
            "outputs": {value.name: _shape(value) for value in model.graph.output},
            "operators": dict(sorted(Counter(n.op_type for n in model.graph.node).items())),
            "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
            "ir_version": model.ir_version,
        }


def _shape(value: Any) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def _forget_origin(message: Any) -> None:
    """Remove where each node came from, everywhere below `message`.

    The exporter stores a stack trace with each node: paths of the machine that exported, which
    make the file differ between machines, and are nobody's business on a phone.
    """
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for below in [value] if hasattr(value, "ListFields") else value:
                _forget_origin(below)
