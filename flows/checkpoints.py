"""A stage's checkpoints, kept on the DVC remote while it trains: another machine can go on there.

Training names a checkpoint by all that decides the result and checks it when it loads one
(kd/artifacts.py), so one that came too late, or is of another experiment, does no harm.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dvc.repo import Repo

PAUSE = 10.0
"""Seconds between two looks at the folder, at least."""
SHARE = 0.05
"""The most of the time that is spent on sending them."""


class Checkpoints:
    """Those of one stage, here and there.  Nothing that goes wrong with them ends a training."""

    def __init__(self, root: Path, stage: str, warn: Callable[[str], None]) -> None:
        """Args: the workspace, the stage's name, and who is told what went wrong."""
        self.here = root / ".kd" / "checkpoints" / stage.replace("@", "/")
        with Repo(str(root)) as repo:
            remote = repo.cloud.get_remote()
        self.fs: Any = remote.fs
        self.there = remote.fs.join(remote.path, "checkpoints", *stage.split("@"))
        self.warn = warn
        self.known: dict[str, int] = {}
        """When each file that is on the remote was written."""

    @contextmanager
    def carried(self) -> Iterator[None]:
        """Bring what there is, keep sending while the block runs, tidy up when it ends well."""
        self._attempt(self._bring)
        ended = threading.Event()
        thread = threading.Thread(target=self._keep_sending, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
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
            self.known[name] = (self.here / name).stat().st_mtime_ns

    def _keep_sending(self, ended: threading.Event) -> None:
        pause = PAUSE
        while not ended.wait(pause):
            started = time.monotonic()
            self._attempt(self._send)
            pause = max(PAUSE, (time.monotonic() - started) / SHARE)

    def _send(self) -> None:
        for path in self.here.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # training replaces it just now
                written = path.stat().st_mtime_ns
                if self.known.get(path.name) != written:
                    self.fs.put_file(str(path), self.fs.join(self.there, path.name))
                    self.known[path.name] = written

    def _tidy(self) -> None:
        """Remove there what training removed here, since its result is written."""
        for name in self.known:
            if not (self.here / name).exists():
                self.fs.rm_file(self.fs.join(self.there, name))

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # each storage has errors of its own
            self.warn(f"checkpoints could not be exchanged with the DVC remote: {error}")
