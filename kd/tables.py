"""Members' logits on disk, computed once for all networks that learn from the same teachers."""

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from filelock import FileLock  # a dependency of PyTorch
from torch import Tensor

from kd.artifacts import (
    ArtifactError,
    atomic,
    check_space,
    code_digest,
    digest,
    read_json,
    sha256,
    write_json,
)

TARGETS = Path(".kd/targets")
"""Members' logits, shared by all networks with the same teachers."""


class DiskTables:
    """A disk cache of members' logits, keyed by a digest of everything that decides them.

    A table is a memory-mapped .npy file, with a record beside it of what it was made from and its
    SHA-256; without a matching record, it is a cache miss.
    """

    cpu_seconds = 0.0
    """What this process spent on making tables; a cache hit costs nothing."""

    def table(
        self, record: Mapping[str, object], shape: tuple[int, ...], fill: Callable[[Tensor], None]
    ) -> Tensor:
        """The float16 table that `record` describes; on a cache miss, `fill` makes it."""
        import numpy as np

        whole = {**record, "code": code_digest(), "shape": list(shape)}
        path = TARGETS / f"{digest(whole)[:32]}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # students trained in parallel need the same
            if not is_of(path, whole):
                check_space(path.parent, 2 * math.prod(shape))
                with atomic(path) as temporary:
                    made = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
                    claim(temporary)
                    begun = time.process_time()
                    fill(torch.from_numpy(made))
                    DiskTables.cpu_seconds += time.process_time() - begun
                    made.flush()
                write_json(path.with_suffix(".json"), {**whole, "sha256": sha256(path)})
            for used in (path, path.with_suffix(".json")):
                os.utime(used)  # under noatime, housekeeping would think them unused
        # "c" (copy-on-write): nothing writes to it, but torch warns about read-only memory.
        return torch.from_numpy(np.load(path, mmap_mode="c"))


def claim(path: Path) -> None:
    """Allocate a sparse file's space now: later, a full disk would kill us with SIGBUS.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def is_of(table: Path, record: Mapping[str, object]) -> bool:
    """Whether a table exists, is intact, and was made from `record`."""
    try:
        found = read_json(table.with_suffix(".json"))
        return found == {**record, "sha256": sha256(table)}
    except (ArtifactError, FileNotFoundError):
        return False
