"""What every format shares: the loaded file, the graph it is made from, quiet third parties.

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
from collections.abc import Callable, Iterator
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
    "read_binary is deprecated",  # importlib.resources, as executorch uses it
    "read_text is deprecated",
    "open_text is deprecated",
)
"""What executorch, torchao and coremltools (which imports both) warn of as they are loaded."""


@dataclass(frozen=True)
class Runner:
    """An exported file, loaded in its own runtime, for any batch size.

    Called with what the file takes: normalised float32 images (B, channels, H, W), or where it
    has the preprocessing inside (`pictures`) uint8 pictures (B, H, W, channels).  Returns logits
    (B, C), or probabilities (B, C) of pictures.
    """

    run: Callable[[Tensor], Tensor]
    """The runtime's call: a contiguous batch to (B, C) on the CPU."""
    image_shape: tuple[int, int, int]
    """One image as the file takes it: channels, H, W; of pictures H, W, channels."""
    any_batch: bool
    """Whether `run` takes any batch; if not it takes single images, and batches are looped."""
    threads: int
    """Threads that the runtime uses."""
    pictures: bool = False
    """Whether the file takes pictures and gives probabilities."""

    def __call__(self, images: Tensor) -> Tensor:
        """What the file makes of a batch.

        Raises:
            ValueError: the batch is of another shape or type than the file takes.
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
        """What the file takes numbers as."""
        return torch.uint8 if self.pictures else torch.float32

    def blank(self, batch: int) -> Tensor:
        """Black pictures, or grey images, such as the file takes."""
        return torch.zeros(batch, *self.image_shape, dtype=self.dtype)


def in_canonical_memory(images: Tensor) -> Tensor:
    """The images with their last axis innermost in memory.

    ExecuTorch reads the strides: channels_last it would take for another layout, and grey images
    count as contiguous in either, so that `.contiguous()` would leave them as they are.
    """
    return images.clone(memory_format=torch.contiguous_format)


def for_export(module: nn.Module) -> nn.Module:
    """A copy of `module` in eval mode, float32, on the CPU; the caller's stays as it is."""
    made = copy.deepcopy(module).to("cpu", torch.float32)
    return made.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def captured(module: nn.Module, example: Tensor) -> ExportedProgram:
    """The graph of `module` for one image, which every format but ONNX starts from.

    Args:
        module: In eval mode, on the CPU.
        example: A batch such as it takes; only shape and type matter.

    Raises:
        ConfigError: what the network does depends on the values in its images, or cannot be
            traced at all.
    """
    with exporting("a graph (torch.export)"):
        return torch.export.export(module, (in_canonical_memory(example[:1]),))


@contextmanager
def exporting(what: str) -> Iterator[None]:
    """Turn an exporter's complaint about the network into a ConfigError that says so."""
    try:
        yield
    except (ConfigError, OSError, MemoryError):
        raise
    except Exception as error:  # each exporter has its own
        root = error.__cause__ or error  # torch.onnx's own says but which step it was
        raise ConfigError(
            f"the network cannot become {what}: {type(root).__name__}: {reason(root)}; "
            "it must do the same steps whatever the image shows, with operators of this format"
        ) from error


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
    with atomic(path) as temporary:
        temporary.write_bytes(data)


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
        PYTREE.addFilter(not_of_torchao)
        try:
            yield
        finally:
            PYTREE.removeFilter(not_of_torchao)


def not_of_torchao(record: logging.LogRecord) -> bool:
    """Whether a line of PyTorch's log is about something else than how torchao registers enums."""
    return "KernelPreference" not in record.getMessage()


@contextmanager
def without_lines(*beginnings: str) -> Iterator[None]:
    """Drop what C++ code writes to standard error, where a line begins so; the rest follows."""
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
