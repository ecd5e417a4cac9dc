"""Training progress on the screen: a bar on a terminal, lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

from kd.train import Epoch


class Progress:
    """A line per epoch and, on a terminal, a bar below them that moves with each step."""

    def __init__(self, name: str, epochs: int, steps: int) -> None:
        """Args: the run name, its epochs, and steps per epoch."""
        self.name = name
        self.epochs = epochs
        self.steps = steps
        self.bar = terminal_bar() if sys.stdout.isatty() else None
        self.started = time.monotonic()
        self.first: int | None = None
        self.done = 0

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.epochs * self.steps)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, done: int) -> None:
        """Show that `done` steps are done."""
        if self.first is None:
            self.first = done  # nonzero if resumed; the first step may include compilation
            self.started = time.monotonic()
        self.done = done
        if self.bar:
            self.bar.update(self.task, completed=done)

    def epoch(self, epoch: Epoch) -> None:
        """Show an epoch."""
        gone = self.done - (self.first or 0)
        left = self.epochs * self.steps - self.done
        seconds = (time.monotonic() - self.started) * left / max(1, gone)
        validation = "".join(f"  val {name} {v:.4f}" for name, v in epoch.validation.items())
        line = (
            f"{self.name}  epoch {epoch.number}/{self.epochs}  loss {epoch.train_loss:.4f}"
            f"{validation}  {epoch.images_per_second:.0f} images/s  {seconds:.0f} s left"
        )
        if self.bar:
            self.bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)


def terminal_bar() -> Any:
    """A bar that shows steps, time elapsed and time left; None if rich is not installed."""
    try:
        from rich import progress
    except ImportError:  # on a machine with only PyTorch
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("steps"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        transient=True,
    )
