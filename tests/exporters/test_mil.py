"""The reference interpreter of Core ML programs computes what MIL's reference says."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd.component import ConfigError
from kd.exporters.mil import OPERATIONS, Program

X = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("add", {"y": X}, 2 * X),
        ("sub", {"y": 1.0}, X - 1),
        ("mul", {"y": 3.0}, X * 3),
        ("real_div", {"y": 4.0}, X / 4),
        ("clip", {"alpha": -0.5, "beta": 0.25}, X.clamp(-0.5, 0.25)),
        ("relu6", {}, F.relu6(4 * X / 4)),
        ("thresholded_relu", {"alpha": 0.5}, F.threshold(X, 0.5, 0.0)),
        ("sigmoid_hard", {"alpha": 1 / 6, "beta": 0.5}, F.hardsigmoid(X)),
        ("silu", {}, X * X.sigmoid()),
        ("softmax", {"axis": 1}, X.exp() / X.exp().sum(1, keepdim=True)),
        ("reduce_mean", {"axes": ints(2, 3), "keep_dims": True}, F.adaptive_avg_pool2d(X, 1)),
        ("reshape", {"shape": ints(1, 144)}, X.flatten(1)),
        ("transpose", {"perm": ints(0, 2, 3, 1)}, X.permute(0, 2, 3, 1)),
        ("expand_dims", {"axes": ints(0, 2)}, X[None, :, None]),
        ("squeeze", {"axes": ints(0)}, X[0]),
        ("pad", {"pad": ints(0, 0, 1, 2, 0, 3, 4, 0)}, F.pad(X, (4, 0, 0, 3, 1, 2))),
        (
            "max_pool",
            {
                "kernel_sizes": ints(3, 3),
                "strides": ints(2, 2),
                "pad_type": "custom",
                "pad": ints(1, 1, 1, 1),
            },
            F.max_pool2d(X, 3, 2, 1),
        ),
        (
            "avg_pool",
            {"kernel_sizes": ints(2, 2), "strides": ints(2, 2), "pad_type": "valid"},
            F.avg_pool2d(X, 2),
        ),
        (
            "slice_by_index",
            {
                "begin": ints(0, 1, 0, 2),
                "end": ints(0, 3, 0, 5),
                "stride": ints(1, 1, 2, 1),
                "begin_mask": torch.tensor([True, False, True, False]),
                "end_mask": torch.tensor([True, False, True, False]),
                "squeeze_mask": torch.tensor([True, False, False, False]),
            },
            X[0, 1:3, ::2, 2:5],
        ),
    ],
)
def test_an_operation_is_that_of_the_same_name(
    name: str, given: dict[str, Any], expected: torch.Tensor
) -> None:
    torch.testing.assert_close(OPERATIONS[name](x=X, **given), expected)


def test_a_convolution_pads_each_side_by_its_own() -> None:
    weight = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    found = OPERATIONS["conv"](
        x=X, weight=weight, strides=ints(2, 1), pad_type="custom", dilations=ints(1, 1),
        groups=2, pad=ints(1, 0, 2, 0),
    )  # fmt: skip
    expected = F.conv2d(F.pad(X, (2, 0, 1, 0)), weight, None, (2, 1), 0, 1, 2)
    torch.testing.assert_close(found, expected)


def test_splits_and_joins_are_inverse() -> None:
    for how in ({"num_splits": 2}, {"split_sizes": ints(1, 3)}):
        parts = OPERATIONS["split"](x=X, axis=1, **how)
        assert torch.equal(OPERATIONS["concat"](values=list(parts), axis=1), X)


def test_an_interleaving_join_is_a_channel_shuffle() -> None:
    found = OPERATIONS["concat"](values=[X, -X], axis=1, interleave=True)
    shuffled = torch.cat([X, -X], 1).view(1, 2, 4, 6, 6).transpose(1, 2).reshape(1, 8, 6, 6)
    assert torch.equal(found, shuffled)


@pytest.mark.parametrize("wrong", [{"pad_type": "same"}, {"pad_type": "same_lower"}])
def test_paddings_that_are_not_known_are_refused_not_guessed(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="does not know the padding"):
        OPERATIONS["max_pool"](
            x=X, kernel_sizes=ints(2, 2), strides=ints(2, 2), pad=ints(0), **wrong
        )


def test_an_operation_that_is_not_known_is_named() -> None:
    operation = SimpleNamespace(op_type="lstm", outputs=[], inputs={})
    function = SimpleNamespace(inputs={"image": object()}, operations=[operation], outputs=[])
    with pytest.raises(ConfigError, match=r"'lstm'.*cannot be verified without a Mac"):
        Program(function)


def test_results_are_rounded_to_the_type_that_the_program_gives_them() -> None:
    from kd.exporters.coreml import _coremltools

    with _coremltools():
        from coremltools.converters.mil import Builder

        @Builder.program(input_specs=[Builder.TensorSpec((1, 3))])
        def made(x):
            half = Builder.cast(x=x, dtype="fp16")
            return Builder.cast(x=Builder.mul(x=half, y=np.float16(0.1)), dtype="fp32")

    image = torch.tensor([[1.0, 0.3, 2049.0]])
    found = Program(made.functions["main"])(image)
    tenth = torch.tensor(0.1).half().float()
    expected = (image.half().float() * tenth).half().float()
    assert torch.equal(found, expected)
    assert not torch.equal(found, image * tenth)
