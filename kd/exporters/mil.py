"""A reference interpreter of Core ML programs (MIL), for machines that have no Core ML.

It runs a program as stored in the file, weights included, one operation after the other in
torch: computed in float32, then rounded to the type that the program declares for the result.
It cannot reproduce the order in which Apple's kernels sum, nor their speed.

Shapes: B batch, H W image.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.component import ConfigError

ROUNDED = {"fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32}


class Program:
    """A function of a MIL program, callable with its one input."""

    def __init__(self, function: Any) -> None:
        """Args: a coremltools MIL function with one input.

        Raises:
            ConfigError: it has an operation that is not supported here.
        """
        (self.input,) = function.inputs.values()
        self.constants: dict[Any, Any] = {}  # keyed by variable, as names are not unique
        self.operations = []
        for operation in function.operations:
            kind = operation.op_type
            if kind == "const":
                self.constants[operation.outputs[0]] = _constant(operation.outputs[0].val)
            elif kind.startswith("constexpr_"):
                value = operation.materialized_val_inference()
                self.constants[operation.outputs[0]] = _constant(value)
            elif kind == "classify":
                self.output = operation.inputs["probabilities"]
            elif kind in OPERATIONS:
                self.operations.append(operation)
            else:
                raise ConfigError(
                    f"the Core ML program has the operation {kind!r}, which the reference "
                    "interpreter (kd/exporters/mil.py) does not know: the file cannot be verified "
                    "without a Mac"
                )
        names = {operation.op_type for operation in function.operations}
        if "classify" not in names:
            (self.output,) = function.outputs

    def __call__(self, image: Tensor) -> Tensor:
        """The program's output for an image; for a classifier, the probabilities."""
        values = {**self.constants, self.input: image}

        def value_of(given: Any) -> Any:
            return (
                [value_of(each) for each in given]
                if isinstance(given, (list, tuple))
                else values[given]
            )

        for operation in self.operations:
            given = {name: value_of(each) for name, each in operation.inputs.items() if each}
            made = OPERATIONS[operation.op_type](**given)
            for variable, tensor in zip(operation.outputs, _several(made), strict=True):
                values[variable] = _rounded(tensor, variable)
        result: Tensor = values[self.output]
        return result


def _constant(value: Any) -> Any:
    """Scalars (number, string, bool) as Python values; arrays as tensors, float16 as float32."""
    if getattr(value, "ndim", 0) == 0:
        return value.item() if hasattr(value, "item") else value
    tensor = torch.from_numpy(value.copy())
    return tensor.float() if tensor.is_floating_point() else tensor


def _several(made: Any) -> Any:
    return made if isinstance(made, (list, tuple)) else [made]


def _rounded(tensor: Tensor, variable: Any) -> Tensor:
    """Round to the variable's type in the program; floats are then widened to float32."""
    from coremltools.converters.mil.mil import types

    held = tensor.to(ROUNDED[types.builtin_to_string(variable.dtype)])
    return held.float() if held.is_floating_point() else held


def _pads(pad_type: str, pad: Tensor | None) -> list[int]:
    """Padding in F.pad's order, last axis first: left, right, top, bottom."""
    if pad_type == "valid" or pad is None:
        return [0, 0, 0, 0]
    if pad_type != "custom":
        raise ConfigError(f"the reference interpreter does not know the padding {pad_type!r}")
    top, bottom, left, right = pad.tolist()
    return [left, right, top, bottom]


def _conv(
    x: Tensor,
    weight: Tensor,
    strides: Tensor,
    pad_type: str,
    dilations: Tensor,
    groups: int,
    pad: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    padded = F.pad(x, _pads(pad_type, pad))
    return F.conv2d(padded, weight, bias, strides.tolist(), 0, dilations.tolist(), groups)


def _max_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor,
    pad_type: str,
    pad: Tensor | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    padded = F.pad(x, _pads(pad_type, pad), value=-torch.inf)
    return F.max_pool2d(padded, kernel_sizes.tolist(), strides.tolist(), ceil_mode=ceil_mode)


def _avg_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor,
    pad_type: str,
    pad: Tensor | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    pads = _pads(pad_type, pad)
    if exclude_padding_from_average and any(pads):
        raise ConfigError("the reference interpreter cannot exclude padding from an average")
    return F.avg_pool2d(F.pad(x, pads), kernel_sizes.tolist(), strides.tolist(), 0, ceil_mode)


def _slice(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    steps = [1] * x.ndim if stride is None else stride.tolist()
    whole = torch.zeros(x.ndim, dtype=torch.bool)
    first, last = (whole if mask is None else mask for mask in (begin_mask, end_mask))
    index = tuple(
        slice(None if first[axis] else begin[axis], None if last[axis] else end[axis], steps[axis])
        for axis in range(x.ndim)
    )
    taken = x[index]
    gone = [] if squeeze_mask is None else squeeze_mask.nonzero().flatten().tolist()
    return taken.squeeze(gone) if gone else taken


def _batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, epsilon: float
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def _pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    pairs = pad.view(-1, 2).tolist()  # (before, after), first axis first; F.pad: last axis first
    flat = [size for pair in reversed(pairs) for size in pair]
    return F.pad(x, flat, mode, constant_val if mode == "constant" else None)


def _concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    if not interleave:
        return torch.cat(values, axis)
    axis %= values[0].ndim  # take the first of each, then the second of each: a channel shuffle
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


def _split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Tensor | None = None
) -> Any:
    if split_sizes is not None:
        return x.split(split_sizes.tolist(), axis)
    return x.chunk(num_splits or 1, axis)


def _expanded(x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.unsqueeze(axis)
    return x


OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "cast": lambda x, dtype: x,  # _rounded casts to the result's type, which is dtype
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "concat": _concat,
    "conv": _conv,
    "expand_dims": lambda x, axes: _expanded(x, sorted(axes.tolist())),
    "identity": lambda x: x,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": lambda x, y, transpose_x=False, transpose_y=False: (
        (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)
    ),
    "max_pool": _max_pool,
    "maximum": lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)),
    "minimum": lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)),
    "mul": lambda x, y: x * y,
    "pad": _pad,
    "real_div": lambda x, y: x / y,
    "reduce_mean": lambda x, axes, keep_dims=False: x.mean(axes.tolist(), keep_dims),
    "relu": lambda x: x.relu(),
    "relu6": lambda x: x.clamp(0, 6),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "silu": lambda x: F.silu(x),
    "slice_by_index": _slice,
    "softmax": lambda x, axis: x.softmax(axis),
    "split": _split,
    "squeeze": lambda x, axes: x.squeeze(axes.tolist()),
    "sub": lambda x, y: x - y,
    "thresholded_relu": lambda x, alpha: torch.where(x >= alpha, x, 0),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
}
"""Each operation, after Core ML's MIL reference; `_rounded` does the rounding."""
