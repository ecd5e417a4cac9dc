"""Mirror a stage's checkpoints to the DVC remote while it trains, so another machine can resume.

The remote folder is named by a hash of the stage's inputs, so a stage downloads only its own
checkpoints.  Training names a checkpoint by everything that determines the result and checks this
on loading (kd/artifacts.py), so a stale checkpoint does no harm.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dvc.repo import Repo

from flows import graph

PAUSE = 10.0
"""Minimum seconds between two scans of the local folder."""
SHARE = 0.05
"""Maximum fraction of the time spent on uploads."""
OLD = 30 * 86_400.0
"""Age in seconds at which an abandoned checkpoint is deleted from the remote."""


class Checkpoints:
    """One stage's checkpoints, local and remote.  A failed transfer never ends the training."""

    def __init__(self, root: Path, stage: str, warn: Callable[[str], None]) -> None:
        """Args: the workspace, the stage's name, and a callback for warnings."""
        self.here = root / ".kd" / "checkpoints" / stage.replace("@", "/")
        read = json.dumps(graph.hashes(root, stage).inputs, sort_keys=True)
        with Repo(str(root)) as repo:
            remote = repo.cloud.get_remote()
        self.fs: Any = remote.fs
        self.every = remote.fs.join(remote.path, "checkpoints", *stage.split("@"))
        self.there = remote.fs.join(self.every, hashlib.sha256(read.encode()).hexdigest()[:32])
        self.warn = warn
        self.known: dict[str, int] = {}
        """Write times of files that need no upload: already uploaded, or not from this run."""

    @contextmanager
    def carried(self) -> Iterator[None]:
        """Download existing checkpoints, then upload new ones until the block has ended.

        If the block succeeds, its result is safe, and the remote checkpoints are deleted.
        """
        self._attempt(self._bring)
        self.known = {path.name: written for path, written in self._written()}
        ended = threading.Event()
        thread = threading.Thread(target=self._keep_sending, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._attempt(self._send)
        self._attempt(self._tidy)

    def _bring(self) -> None:
        if not self.fs.exists(self.there):
            return
        self.here.mkdir(parents=True, exist_ok=True)
        for path in self.fs.find(self.there):
            name = self.fs.name(path)
            part = self.here / f".{name}.part"
            self.fs.get_file(path, str(part))
            part.replace(self.here / name)

    def _keep_sending(self, ended: threading.Event) -> None:
        pause = PAUSE
        while not ended.wait(pause):
            started = time.monotonic()
            self._attempt(self._send)
            pause = max(PAUSE, (time.monotonic() - started) / SHARE)

    def _send(self) -> None:
        for path, written in self._written():
            if self.known.get(path.name) != written:
                with suppress(FileNotFoundError):  # training is replacing it
                    self.fs.put_file(str(path), self.fs.join(self.there, path.name))
                    self.known[path.name] = written

    def _written(self) -> Iterator[tuple[Path, int]]:
        """The stage's local checkpoints, each with its write time."""
        for path in self.here.glob("*.safetensors"):
            with suppress(FileNotFoundError):
                yield path, path.stat().st_mtime_ns

    def _tidy(self) -> None:
        """Delete this run's remote checkpoints, and old abandoned ones of the same stage."""
        if self.fs.exists(self.there):
            self.fs.rm(self.there, recursive=True)
        if self.fs.exists(self.every):
            for path in self.fs.find(self.every):
                if self.fs.modified(path).timestamp() < time.time() - OLD:
                    self.fs.rm_file(path)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # each storage backend has its own errors
            self.warn(f"checkpoints could not be synced with the DVC remote: {error}")
