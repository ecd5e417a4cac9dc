"""Quantise a network's graph with torchao's PT2E, after training (PTQ) or during it (QAT).

Convolutions and linear layers get symmetric int8 weights with one scale per output channel, and
int8 activations with one scale per tensor.

Shapes: N samples, B batch, H W image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd.exporters.files import (
    AT_IMPORT,
    captured,
    exporting,
    for_export,
    ignoring,
    require_packages,
)


def quantised(module: nn.Module, images_NCHW: Tensor) -> nn.Module:
    """A quantised copy of `module`, its activation ranges calibrated on `images_NCHW`.

    Returns:
        A graph for one image with explicit quantise/dequantise ops, which backends lower to int8.
    """
    with torchao():
        from torchao.quantization.pt2e import allow_exported_model_train_eval
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        graph: Any = captured(for_export(module), images_NCHW).module()
        watched = prepare_pt2e(graph, _xnnpack(qat=False))
        with torch.inference_mode():
            for image_CHW in images_NCHW:
                watched(image_CHW[None])
        converted: nn.Module = convert_pt2e(watched)
        allow_exported_model_train_eval(converted)
    return converted


def simulated(module: nn.Module, image_shape: tuple[int, int, int]) -> nn.Module:
    """A copy of `module` with fake quantisation of weights and activations, for training.

    Its parameters and buffers have the same names as in `module`; it also learns the activation
    ranges.  Batch norm statistics are updated as in ordinary training.

    Args:
        module: The network.
        image_shape: Channels, H, W.
    """
    with torchao(), exporting("a graph to train in int8 (torch.export)"):
        from torchao.quantization.pt2e import allow_exported_model_train_eval
        from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

        # Traced in the memory format that fit() trains in, as a view may be valid only in one.
        learner = for_export(module).train().requires_grad_()
        learner = learner.to(memory_format=torch.channels_last)
        images_BCHW = torch.zeros(2, *image_shape).to(memory_format=torch.channels_last)
        shapes = ({0: torch.export.Dim("batch")},)
        graph: Any = torch.export.export(learner, (images_BCHW,), dynamic_shapes=shapes).module()
        prepared: nn.Module = prepare_qat_pt2e(graph, _xnnpack(qat=True))
        allow_exported_model_train_eval(prepared)
    return prepared


def with_weights_of(learned: nn.Module, module: nn.Module) -> nn.Module:
    """A copy of `module` with the parameters and buffers of `learned`, its `simulated` copy."""
    made = for_export(module)
    state = learned.state_dict()
    made.load_state_dict({name: state[name] for name in made.state_dict()})
    return made


@contextmanager
def torchao() -> Iterator[None]:
    """Check that torchao and executorch are installed; call them without their own warnings."""
    require_packages("torchao", "executorch")
    with ignoring(
        *AT_IMPORT,
        "erase_node",  # warned when batch norms are folded
    ):
        yield


def _xnnpack(qat: bool) -> Any:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=qat)
    return XNNPACKQuantizer().set_global(config)
