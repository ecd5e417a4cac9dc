"""ExecuTorch: one .pte file for phones, its convolutions run by XNNPACK.

Shapes: B batch, C classes, H W image.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kd.component import component
from kd.exporters.files import (
    Runner,
    for_export,
    ignoring,
    in_canonical_memory,
    readable,
    require_packages,
    write,
)
from kd.exporters.parity import Tolerance


@component
class ExecuTorch:
    """A fixed-shape fp32 program: one image in, one row of logits out."""

    kind: Literal["executorch"] = "executorch"
    tolerance: Tolerance = Tolerance()
    """How far from eager the file may be and still be published."""

    suffix: ClassVar[str] = ".pte"

    def export(self, module: nn.Module, example_BCHW: Tensor, path: Path) -> None:
        """Write `module` to `path`.

        Args:
            module: The trained network; neither moved nor changed.
            example_BCHW: Images as the network takes them; only their shape matters here.
            path: The file to write, whole or not at all.

        Raises:
            ConfigError: the package executorch is not installed.
        """
        with _executorch():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                XnnpackPartitioner,
            )
            from executorch.exir import to_edge_transform_and_lower

            image_1CHW = in_canonical_memory(example_BCHW[:1].to("cpu", torch.float32))
            program = torch.export.export(for_export(module), (image_1CHW,))
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            write(path, lowered.to_executorch().buffer)

    def load(self, path: Path, threads: int = 1) -> Runner:
        """The file at `path` in ExecuTorch's own runtime.

        Raises:
            ConfigError: the package is not installed, or the file is not a program of its.
        """
        data = path.read_bytes()
        with _executorch(), readable(path, "an ExecuTorch program"):
            program = _Program(data, threads)
            _, channels, height, width = program.input_shape()
        return Runner(program, (channels, height, width), any_batch=False, threads=threads)

    def inspect(self, path: Path) -> dict[str, Any]:
        """What is in the file at `path`.

        Returns:
            inputs and outputs (shape by name; in the file itself they go by position), delegates
            (subgraphs by backend) and undelegated (calls of each operator left to the slower
            portable kernels).
        """
        data = path.read_bytes()
        with _executorch(), readable(path, "an ExecuTorch program"):
            from executorch.exir._serialize._program import deserialize_pte_binary

            (plan,) = deserialize_pte_binary(data).program.execution_plan
        shape_of = [getattr(value.val, "sizes", None) for value in plan.values]
        return {
            "inputs": {"images": shape_of[plan.inputs[0]]},
            "outputs": {"logits": shape_of[plan.outputs[0]]},
            "delegates": _counted(delegate.id for delegate in plan.delegates),
            "undelegated": _counted(_undelegated(plan)),
        }


class _Program:
    """A program in the runtime, which lives as long as this does.

    The runtime has one pool of threads a process, and XNNPACK keeps the address of the pool that
    was there when it loaded a program.  So the pool gets its threads before the program is loaded,
    and a program loaded before the pool was last replaced is loaded again.
    """

    _pool = 0  # of this process: how often it was replaced

    def __init__(self, data: bytes, threads: int) -> None:
        self._data, self._threads = data, threads
        self._load()

    def __call__(self, image_1CHW: Tensor) -> Tensor:
        if self._replace_pool() or self._loaded_with != _Program._pool:
            self._load()
        logits_1C: Tensor = self._method.execute([image_1CHW])[0]
        return logits_1C

    def input_shape(self) -> tuple[int, ...]:
        return tuple(self._method.metadata.input_tensor_meta(0).sizes())

    def _load(self) -> None:
        from executorch.runtime import Runtime

        self._replace_pool()
        self._loaded_with = _Program._pool
        self._program = Runtime.get().load_program(self._data)  # must outlive its method
        self._method = self._program.load_method("forward")

    def _replace_pool(self) -> bool:
        """Make the pool one of this program's number of threads; whether it was another."""
        from executorch.extension.pybindings import portable_lib

        if portable_lib._threadpool_get_thread_count() == self._threads:
            return False
        portable_lib._unsafe_reset_threadpool(self._threads)
        _Program._pool += 1
        return True


def _undelegated(plan: Any) -> Iterator[str]:
    """The operator of each call in the plan that no backend has taken."""
    for chain in plan.chains:
        for instruction in chain.instructions:
            index = getattr(instruction.instr_args, "op_index", None)
            if index is not None:
                yield f"{plan.operators[index].name}.{plan.operators[index].overload}"


def _counted(names: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


@contextmanager
def _executorch() -> Iterator[None]:
    """Room for executorch's imports and calls: installed, and its own affairs kept quiet."""
    require_packages("executorch")
    with ignoring(
        "This API is experimental and subject to change",  # of its Python runtime, at import
        "invalid escape sequence",  # in torchao's sources, when first compiled
        "read_binary is deprecated",  # importlib.resources, as executorch uses it
        "read_text is deprecated",
        "open_text is deprecated",
    ):
        yield
