"""What a terminal shows of a stage that fails."""

import io
import logging

from rich.console import Console

from flows.display import Progress
from flows.graph import Plan, Stage


def record(message: str, **extra: str) -> logging.LogRecord:
    made = logging.LogRecord("stage", logging.INFO, "", 0, message, (), None)
    made.__dict__.update({"task_run_name": "bad", **extra})
    return made


def test_a_terminal_shows_the_last_lines_of_a_failure_once_and_its_reason_in_the_table() -> None:
    seen = io.StringIO()
    console = Console(file=seen, force_terminal=True, width=80, no_color=True)
    plan = Plan((Stage("bad", ()),), {"bad": "never run"})
    with Progress(plan, console) as progress:
        progress.emit(record("starts on 1 thread", stage_state="running"))
        progress.emit(record("epoch 1"))
        before = len(seen.getvalue())
        progress.emit(record("lr is -1", stage_state="failed"))
        said = seen.getvalue()[before:]
    assert said.count("| epoch 1") == said.count("| lr is -1") == 1
    assert progress.rows["bad"].line == "lr is -1"
