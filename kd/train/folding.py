"""Fold the batch norms of a frozen network into the convolutions before them.

B batch, C classes.
"""

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

TOLERANCE = 1e-3
"""Largest accepted difference in logits, relative to the largest logit: rounding stays far below
it, and a copy that computes something else lies far above."""


def folded(network: nn.Module, images_B: Tensor) -> nn.Module:
    """A copy of a network that gives the same logits with fewer passes over memory.

    Args:
        network: In eval mode.
        images_B: A few images, on the network's device, to compare the two on.

    Returns:
        The copy, or `network` itself if it cannot be traced or the copy's logits differ.
    """
    try:
        copy = fuse(network)
        with torch.inference_mode():
            found_BC, wanted_BC = copy(images_B), network(images_B)
    except Exception:  # tracing runs the user's forward, which may raise anything
        return network
    apart, scale = (found_BC - wanted_BC).abs().max(), wanted_BC.abs().max()
    return copy.eval() if apart <= TOLERANCE * scale else network
