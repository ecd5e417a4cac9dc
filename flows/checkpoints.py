"""A stage's checkpoints, kept on the DVC remote while it trains: another machine can go on there.

They lie in a folder named by what the stage reads, so that it is brought its own alone.  Training
names a checkpoint by all that decides the result and checks it when it loads one
(kd/artifacts.py), so one that came too late does no harm.
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
"""Seconds between two looks at the folder, at least."""
SHARE = 0.05
"""The most of the time that is spent on sending them."""
OLD = 30 * 86_400.0
"""Seconds after which nobody is expected to go on with a training that was left."""


class Checkpoints:
    """Those of one stage, here and there.  Nothing that goes wrong with them ends a training."""

    def __init__(self, root: Path, stage: str, warn: Callable[[str], None]) -> None:
        """Args: the workspace, the stage's name, and who is told what went wrong."""
        self.here = root / ".kd" / "checkpoints" / stage.replace("@", "/")
        read = json.dumps(graph.hashes(root, stage).inputs, sort_keys=True)
        with Repo(str(root)) as repo:
            remote = repo.cloud.get_remote()
        self.fs: Any = remote.fs
        self.every = remote.fs.join(remote.path, "checkpoints", *stage.split("@"))
        self.there = remote.fs.join(self.every, hashlib.sha256(read.encode()).hexdigest()[:32])
        self.warn = warn
        self.known: dict[str, int] = {}
        """When each file was written that is not to be sent: it is there, or is not this run's."""

    @contextmanager
    def carried(self) -> Iterator[None]:
        """Bring what there is, send what is written while the block runs, the last of it too.

        Where the block ends well, its result is safe, and the checkpoints are removed there.
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
                with suppress(FileNotFoundError):  # training replaces it just now
                    self.fs.put_file(str(path), self.fs.join(self.there, path.name))
                    self.known[path.name] = written

    def _written(self) -> Iterator[tuple[Path, int]]:
        """The stage's checkpoints here, and when each was written."""
        for path in self.here.glob("*.safetensors"):
            with suppress(FileNotFoundError):
                yield path, path.stat().st_mtime_ns

    def _tidy(self) -> None:
        """Remove there what led to the result, and what others left long ago."""
        if self.fs.exists(self.there):
            self.fs.rm(self.there, recursive=True)
        if self.fs.exists(self.every):
            for path in self.fs.find(self.every):
                if self.fs.modified(path).timestamp() < time.time() - OLD:
                    self.fs.rm_file(path)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # each storage has errors of its own
            self.warn(f"checkpoints could not be exchanged with the DVC remote: {error}")
