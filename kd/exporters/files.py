"""Shared by all formats: the loaded file, the captured graph, silencing of third parties.

Shapes: B batch, C classes, H W image.
"""

import copy
import importlib.util
import logging
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kd.component import ConfigError, reason
from kd.disk import atomic

PYTREE = logging.getLogger("torch.utils._pytree")
AT_IMPORT = (
    "invalid escape sequence",  # in torchao's and coremltools' sources, when first compiled
    "read_binary is deprecated",  # executorch's use of importlib.resources
    "read_text is deprecated",
    "open_text is deprecated",
)
"""Warnings that executorch, torchao and coremltools (which imports both) give at import."""


@dataclass(frozen=True)
class Runner:
    """An exported file loaded in its own runtime, callable with any batch size.

    Takes what the file takes: normalised float32 images (B, channels, H, W), or uint8 pictures
    (B, H, W, channels) if the file includes the preprocessing (`pictures`).  Returns logits
    (B, C) for images, probabilities (B, C) for pictures.
    """

    run: Callable[[Tensor], Tensor]
    """Calls the runtime: a contiguous batch to (B, C) on the CPU."""
    image_shape: tuple[int, int, int]
    """Shape of one input: (channels, H, W); for pictures (H, W, channels)."""
    any_batch: bool
    """Whether `run` takes any batch size; if not, it is called once per image."""
    threads: int
    """Threads that the runtime uses."""
    pictures: bool = False
    """Whether the file takes pictures and returns probabilities."""

    def __call__(self, images: Tensor) -> Tensor:
        """Run the file on a batch.

        Raises:
            ValueError: the batch has another shape or dtype than the file takes.
        """
        if tuple(images.shape[1:]) != self.image_shape or images.dtype != self.dtype:
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; the file takes "
                f"{self.dtype} of shape {('B', *self.image_shape)}"
            )
        images = in_canonical_memory(images)
        if self.any_batch:
            return self.run(images)
        return torch.cat([self.run(image[None]) for image in images])

    @property
    def dtype(self) -> torch.dtype:
        """The file's input dtype."""
        return torch.uint8 if self.pictures else torch.float32

    def blank(self, batch: int) -> Tensor:
        """A batch of zeros as the file takes it: black pictures, or images at the mean."""
        return torch.zeros(batch, *self.image_shape, dtype=self.dtype)


def in_canonical_memory(images: Tensor) -> Tensor:
    """A copy of the images with the last axis innermost in memory.

    ExecuTorch reads the strides and would misread channels_last.  `.contiguous()` is not enough:
    single-channel images count as contiguous in both layouts, and it would not change them.
    """
    return images.clone(memory_format=torch.contiguous_format)


def for_export(module: nn.Module) -> nn.Module:
    """A copy of `module` in eval mode, float32, on the CPU; `module` itself is not changed."""
    made = copy.deepcopy(module).to("cpu", torch.float32)
    return made.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def captured(module: nn.Module, example: Tensor) -> ExportedProgram:
    """Capture the graph of `module` for one image; every format but ONNX starts from it.

    Args:
        module: In eval mode, on the CPU.
        example: An input batch; only its shape and dtype matter.

    Raises:
        ConfigError: the network's control flow depends on the values in its images, or it
            cannot be traced at all.
    """
    with exporting("a graph (torch.export)"):
        return torch.export.export(module, (in_canonical_memory(example[:1]),))


@contextmanager
def exporting(what: str) -> Iterator[None]:
    """Turn an exporter's error about the network into a ConfigError."""
    try:
        yield
    except (ConfigError, OSError, MemoryError):
        raise
    except Exception as error:  # each exporter raises its own types
        root = error.__cause__ or error  # torch.onnx's own error only names the failed step
        raise ConfigError(
            f"the network cannot become {what}: {type(root).__name__}: {reason(root)}; "
            "it must do the same steps for every image, with operators that this format supports"
        ) from error


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use `threads` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require_packages(*packages: str) -> None:
    """Raise a ConfigError that names the first of `packages` that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"this export needs the package {package!r}, which is not installed; "
                "run: pip install 'kd[exports]'"
            )


def write(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def counted(names: Iterable[str]) -> dict[str, int]:
    """How often each name occurs, in alphabetical order."""
    return dict(sorted(Counter(names).items()))


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn a runtime's error about the file's content into a ConfigError that names the file."""
    try:
        yield
    except Exception as error:  # each runtime raises its own types, even struct.error
        raise ConfigError(
            f"{path} is damaged or not {what} ({reason(error)}); export it again"
        ) from error


@contextmanager
def ignoring(*messages: str) -> Iterator[None]:
    """Ignore warnings that begin with one of `messages`, and torchao's enum log lines."""
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=re.escape(message))
        PYTREE.addFilter(not_of_torchao)
        try:
            yield
        finally:
            PYTREE.removeFilter(not_of_torchao)


def not_of_torchao(record: logging.LogRecord) -> bool:
    """Log filter: drop PyTorch's lines about how torchao registers its enums."""
    return "KernelPreference" not in record.getMessage()


@contextmanager
def without_lines(*beginnings: str) -> Iterator[None]:
    """Drop C++ code's lines on stderr that begin so; the others are written after the block."""
    sys.stderr.flush()
    usual = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(usual, 2)
            os.close(usual)
            caught.seek(0)
            for line in caught:
                if not line.decode(errors="replace").startswith(beginnings):
                    os.write(2, line)
