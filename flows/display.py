"""Terminal output of a run: the plan, each stage's state and last log line, and the result.

The display only reads the tasks' log records, so the flow needs no extra hooks for it.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from flows import timeline
from flows.graph import Plan

LAST_LINES = 15
STYLES = {"running": "cyan", "done": "green", "failed": "bold red", "stopped": "yellow"}


def show_plan(plan: Plan, console: Console) -> None:
    """Print which stages will run, and why."""
    console.print(f"[bold]{len(plan.reasons)} of {len(plan.stages)} stages to run[/]")
    table = Table(box=None, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("because", style="dim")
    for stage, reason in plan.reasons.items():
        table.add_row(stage, reason)
    console.print(table)
    console.print()


FURTHER = """\
Where to look next:
  make ui                       every run in MLflow, every stage in Prefect, in the browser
  . .venv/bin/activate          puts the next commands on your path
  dvc dag                       what depends on what
  dvc metrics show              every stage's figures
  dvc plots show                curves, as a page
"""


def show_report(root: Path, console: Console) -> None:
    """Print the report, if the pipeline made one, and commands for further inspection."""
    report = root / "artifacts" / "report" / "report.md"
    if report.exists():
        text = report.read_text("utf-8")
        if console.is_terminal:
            console.print(Markdown(text))
        else:
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        console.print(FURTHER, markup=False, highlight=False, soft_wrap=True)


def show_timeline(root: Path, console: Console) -> None:
    """Print when each stage waited, ran and ended, if the run got far enough to record it."""
    drawn = root / timeline.FILE
    if drawn.exists():
        console.print(drawn.read_text("utf-8"), markup=False, highlight=False, soft_wrap=True)


@dataclass
class Row:
    """One stage on the screen."""

    state: str = "waiting"
    started: float = 0.0
    ended: float = 0.0
    line: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    """The last lines it logged, shown on a terminal if it fails."""

    def seconds(self) -> str:
        """Its running time, formatted; empty if it has not started."""
        if not self.started:
            return ""
        return f"{(self.ended or time.monotonic()) - self.started:.1f} s"


class Progress(logging.Handler):
    """Shows the progress of a plan's stages: a live table on a terminal, else line by line."""

    def __init__(self, plan: Plan, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console
        names = [*plan.reasons, *(["promote"] if plan.promotes else [])]
        self.rows = {name: Row() for name in names}
        self.width = max(len(name) for name in self.rows)
        self.live = Live(self, console=console, refresh_per_second=5, transient=False)

    def __enter__(self) -> "Progress":
        """Start listening."""
        logging.getLogger("prefect.task_runs").addHandler(self)
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening; stages still waiting are marked as not run."""
        logging.getLogger("prefect.task_runs").removeHandler(self)
        for row in self.rows.values():
            if row.state == "waiting":
                row.state = "not run"
        if self.console.is_terminal:
            self.live.stop()
        else:
            self.console.print(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Handle a record of a task's log."""
        name = getattr(record, "task_run_name", "")
        if name not in self.rows:
            return
        message = record.getMessage()
        state = getattr(record, "stage_state", None)
        if state == "waiting":
            return  # rows start in this state
        if state or self.rows[name].state == "running":
            self._follow(self.rows[name], message, state)
            if not self.console.is_terminal:
                self._print(name, message)
            elif state == "failed":
                self._print(name, "\n".join(self.rows[name].lines), style="red")

    def _follow(self, row: Row, message: str, state: str | None) -> None:
        if state == "running":
            row.lines.clear()
        row.line = message.partition("\n")[0].strip()
        row.lines.extend(message.splitlines())
        if state:
            row.state = state
        if state == "running":
            row.started, row.ended = time.monotonic(), 0.0
        elif state:
            row.ended = time.monotonic()

    def _print(self, name: str, message: str, style: str = "") -> None:
        for line in message.splitlines():
            text = Text(f"{name:{self.width}} | {line}", style=style)
            self.console.print(text, soft_wrap=True)

    def __rich__(self) -> Group:
        """The current table."""
        table = Table(box=None, pad_edge=False)
        table.add_column("stage", min_width=self.width)
        table.add_column("state", min_width=max(map(len, STYLES)))
        table.add_column("time", justify="right", min_width=len("1000.0 s"))
        table.add_column("last line", no_wrap=True, overflow="ellipsis", style="dim")
        for name, row in self.rows.items():
            state = Text(row.state, style=STYLES.get(row.state, "dim"))
            line = "" if row.state == "done" else row.line
            table.add_row(name, state, row.seconds(), Text(line, overflow="ellipsis"))
        return Group(table)
