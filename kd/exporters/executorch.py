"""ExecuTorch: one .pte file for phones, delegated to XNNPACK.

Shapes: C classes, H W image.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from kd.component import component
from kd.exporters.files import (
    AT_IMPORT,
    Runner,
    captured,
    counted,
    exporting,
    ignoring,
    readable,
    require_packages,
    without_lines,
    write,
)
from kd.exporters.format import Tolerance
from kd.exporters.int8 import Int8
from kd.exporters.pt2e import quantised
from kd.exporters.trained import Trained

BYTE = 0
"""ExecuTorch's number for uint8."""


@component
class ExecuTorch:
    """A program that takes one image at a time."""

    kind: Literal["executorch"] = "executorch"
    precision: Literal["fp32", "int8"] = "fp32"
    int8: Int8 = Int8()
    """Quantisation settings; used only if the precision is int8."""
    picture_input: bool = False
    """Take pictures (uint8, NHWC), return probabilities; off: normalised images and logits."""
    tolerance: Tolerance = Tolerance()
    """How far outputs may differ from the eager network's before the file is refused."""

    suffix: ClassVar[str] = ".pte"
    runs_here: ClassVar[bool] = True

    def check(self) -> None:
        """Raise a ConfigError if a package is missing."""
        require_packages("executorch", "torchao")

    def export(self, trained: Trained, path: Path) -> None:
        """Write the network to `path`, with methods `labels` and `metadata` besides `forward`.

        Raises:
            ConfigError: a package is not installed, the network cannot be exported, or the
                precision is int8 and there are no calibration pictures.
        """
        self.check()
        images_NCHW = None
        if self.precision == "int8":
            images_NCHW = trained.calibration(self.int8.calibration_images)
        with _executorch(), exporting("an ExecuTorch program"):
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                XnnpackPartitioner,
            )
            from executorch.exir import to_edge_transform_and_lower

            network = None
            if images_NCHW is not None:
                network = quantised(trained.module, images_NCHW)
            served = trained.served(self.picture_input, network)
            lowered = to_edge_transform_and_lower(
                captured(served, trained.example(self.picture_input)),
                partitioner=[XnnpackPartitioner()],
                constant_methods={
                    "labels": list(trained.class_names),
                    "metadata": [json.dumps(trained.description())],
                },
            )
            write(path, lowered.to_executorch().buffer)

    def load(self, path: Path, threads: int = 1) -> Runner:
        """Load the file at `path` in the ExecuTorch runtime.

        Raises:
            ConfigError: the package is not installed, or the file is not an ExecuTorch program.
        """
        data = path.read_bytes()
        with _executorch(), readable(path, "an ExecuTorch program"):
            program = _Program(data, threads)
            _, *shape = program.input_meta.sizes()
            first, second, third = shape
            pictures = program.input_meta.dtype() == BYTE
        return Runner(program, (first, second, third), False, threads, pictures)

    def inspect(self, path: Path) -> dict[str, Any]:
        """Describe the file at `path`.

        Returns:
            inputs and outputs (shape by name; the file itself has only positions), delegates
            (number of subgraphs per backend), undelegated (calls of each operator left to the
            slower portable kernels), labels, metadata, and the runtime that read it.
        """
        data = path.read_bytes()
        with _executorch(), readable(path, "an ExecuTorch program"):
            from executorch.exir._serialize._program import deserialize_pte_binary
            from executorch.runtime import Runtime

            plans = deserialize_pte_binary(data).program.execution_plan
            plan = next(plan for plan in plans if plan.name == "forward")
            tensor_of = [value.val for value in plan.values]
            image, output = (tensor_of[each[0]] for each in (plan.inputs, plan.outputs))
            program = Runtime.get().load_program(data)
            labels = program.load_method("labels").execute([])
            (metadata,) = program.load_method("metadata").execute([])
        pictures = image.scalar_type == BYTE
        return {
            "inputs": {"image": image.sizes},
            "outputs": {"probabilities" if pictures else "logits": output.sizes},
            "delegates": counted(delegate.id for delegate in plan.delegates),
            "undelegated": counted(_undelegated(plan)),
            "labels": labels,
            "metadata": json.loads(metadata),
            "runtime": f"ExecuTorch {version('executorch')}",
        }


class _Program:
    """A program loaded in the runtime, kept alive as long as this object.

    The runtime has one thread pool per process, and XNNPACK keeps the address of the pool that
    existed when it loaded a program.  So the pool is resized before a program is loaded, and a
    program loaded before the pool was last replaced is reloaded.  We count replacements because
    asking the runtime on each call would add to the measured latency.
    """

    _pool = 0  # how often this process has replaced its pool

    def __init__(self, data: bytes, threads: int) -> None:
        if data[4:8] != b"ET12":  # the runtime aborts if it cannot show what is there instead
            raise ValueError("it lacks the identifier ET12")
        self._data, self._threads = data, threads
        self._load()

    def __call__(self, image: Tensor) -> Tensor:
        if self._loaded_with != _Program._pool:
            self._load()
        output_1C: Tensor = self._method.execute([image])[0]
        return output_1C

    @property
    def input_meta(self) -> Any:
        return self._method.metadata.input_tensor_meta(0)

    def _load(self) -> None:
        from executorch.runtime import Runtime

        self._size_pool()
        self._loaded_with = _Program._pool
        self._program = Runtime.get().load_program(self._data)  # must outlive its method
        self._method = self._program.load_method("forward")

    def _size_pool(self) -> None:
        """Replace the pool if it does not have this program's number of threads."""
        from executorch.extension.pybindings import portable_lib

        with without_lines("[cpuinfo_utils.cpp", "[threadpool.cpp"):  # logs of core detection
            if portable_lib._threadpool_get_thread_count() != self._threads:
                portable_lib._unsafe_reset_threadpool(self._threads)
                _Program._pool += 1


def _undelegated(plan: Any) -> Iterator[str]:
    """Yield the operator of each call in the plan that was not delegated to a backend."""
    for chain in plan.chains:
        for instruction in chain.instructions:
            index = getattr(instruction.instr_args, "op_index", None)
            if index is not None:
                yield f"{plan.operators[index].name}.{plan.operators[index].overload}"


@contextmanager
def _executorch() -> Iterator[None]:
    """Check that executorch is installed; import and call it without its own warnings."""
    require_packages("executorch")
    with ignoring(
        "This API is experimental and subject to change",  # its Python runtime, at import
        *AT_IMPORT,
    ):
        yield
