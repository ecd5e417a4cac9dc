"""What every format shares: the loaded file, the copy that is exported, quiet third parties.

Shapes: B batch, C classes, H W image.
"""

import copy
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kd.component import ConfigError


@dataclass(frozen=True)
class Runner:
    """An exported file, loaded in its own runtime: images in, logits out, for any batch size."""

    run: Callable[[Tensor], Tensor]
    """The runtime's call: contiguous float32 (B, channels, H, W) to logits (B, C) on the CPU."""
    image_shape: tuple[int, int, int]
    """Channels, H, W that the file takes."""
    any_batch: bool
    """Whether `run` takes any batch; if not it takes single images, and batches are looped."""
    threads: int
    """Threads that the runtime uses."""

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, channels, H, W)."""
        if tuple(images_BCHW.shape[1:]) != self.image_shape or images_BCHW.dtype != torch.float32:
            raise ValueError(
                f"images are {images_BCHW.dtype} of shape {tuple(images_BCHW.shape)}; the file "
                f"takes float32 of shape {('B', *self.image_shape)}"
            )
        images_BCHW = in_canonical_memory(images_BCHW)
        if self.any_batch:
            return self.run(images_BCHW)
        return torch.cat([self.run(image_CHW[None]) for image_CHW in images_BCHW])


def in_canonical_memory(images_BCHW: Tensor) -> Tensor:
    """The images in memory order B, channels, H, W.

    ExecuTorch reads the strides: channels_last it would take for another layout, and grey images
    count as contiguous in either, so that `.contiguous()` would leave them as they are.
    """
    return images_BCHW.clone(memory_format=torch.contiguous_format)


def for_export(module: nn.Module) -> nn.Module:
    """A copy of `module` in eval mode, float32, on the CPU; the caller's stays as it is."""
    made = copy.deepcopy(module).to("cpu", torch.float32)
    return made.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use `threads` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require_packages(*packages: str) -> None:
    """Refuse with a ConfigError, naming it, the first of `packages` that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"this export needs the package {package!r}, which is not installed; "
                "run: pip install 'kd[exports]'"
            )


def write(path: Path, data: bytes) -> None:
    """Write the whole file or none of it."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_bytes(data)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn a runtime's complaint about the file's content into a ConfigError that names it."""
    try:
        yield
    except Exception as error:  # each runtime has its own, down to struct.error
        raise ConfigError(f"{path} is damaged or not {what} ({error}); export it again") from error


@contextmanager
def ignoring(*messages: str) -> Iterator[None]:
    """Ignore third parties' warnings that begin with one of `messages`, and no others."""
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=re.escape(message))
        yield
