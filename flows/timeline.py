"""When each stage waited, ran and ended, and on which slot: a text chart.

    teacher           ██████                      2 threads   31.0 s
    assistants@large        ░░████████████████    GPU 0       80.4 s  after 10.2 s of waiting

It is printed at the end of a run, and is one of the flow run's artifacts.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FILE = Path(".kd", "timeline.txt")
"""The last run's timeline."""
WIDTH = 48
"""Characters in a bar that spans the whole run."""
WAITS, RUNS = "░", "█"
LOGGER = logging.getLogger("prefect.task_runs")


@dataclass
class Span:
    """One attempt at a stage; times in seconds since 1970."""

    stage: str
    ready: float
    """When all its inputs were ready and it asked for a slot."""
    started: float | None = None
    slot: str = "no slot"
    ended: float | None = None
    state: str = "done"


class Timeline(logging.Handler):
    """A log handler that follows a run's stages through the tasks' logs, wherever they run."""

    def __init__(self, flow_run: str) -> None:
        """Args: flow_run: The id of the flow run to follow; a process may have several."""
        super().__init__(logging.INFO)
        self.flow_run = flow_run
        self.spans: list[Span] = []

    def __enter__(self) -> "Timeline":
        """Start listening."""
        LOGGER.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        LOGGER.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Process a task's log record if it marks a change of a stage's state."""
        state = getattr(record, "stage_state", None)
        if not state or str(getattr(record, "flow_run_id", "")) != self.flow_run:
            return
        name = getattr(record, "task_run_name", "")
        if state == "waiting":
            self.spans.append(Span(name, record.created))
        for span in self.spans:
            if span.stage == name and span.ended is None and state != "waiting":
                self._follow(span, record, state)

    def _follow(self, span: Span, record: logging.LogRecord, state: str) -> None:
        if state == "running":
            span.started = record.created
            span.slot = record.getMessage().removeprefix("starts on ")
        else:
            span.ended, span.state = record.created, state

    def draw(self) -> str:
        """Draw a line per stage, and how busy the slots were; "" if nothing ran."""
        now = time.time()
        for span in self.spans:
            if span.ended is None:
                span.ended, span.state = now, "stopped"
        return draw(self.spans)


def draw(spans: Iterable[Span]) -> str:
    """Draw the timeline of spans that have ended."""
    every = sorted(spans, key=lambda each: each.ready)
    if not every:
        return ""
    first, last = every[0].ready, max(each.ended or 0 for each in every)
    whole = (last - first) or 1.0
    rows = [_row(each, first, whole) for each in every]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", *_use(every, whole)])


def _row(span: Span, first: float, whole: float) -> tuple[str, str, str, str, str]:
    def at(moment: float) -> int:
        return round((moment - first) / whole * WIDTH)

    end = span.ended or span.ready
    ran = end - (span.started or end)
    waited = end - span.ready - ran
    # Whatever ran gets at least one character.
    ready, ended = min(at(span.ready), WIDTH - 1), at(end)
    started = ended if span.started is None else min(at(span.started), WIDTH - 1)
    ended = max(ended, min(started + 1, WIDTH))
    bar = " " * ready + WAITS * (started - ready) + RUNS * (ended - started)
    said = [span.state] if span.state != "done" else []
    said += [f"after {waited:.1f} s of waiting"] if waited >= 1 else []
    return span.stage, bar.ljust(WIDTH), span.slot, f"{ran:8.1f} s", ", ".join(said)


def _use(spans: Iterable[Span], whole: float) -> Iterator[str]:
    """How many stages ran at a time on average, overall and on each GPU or worker."""
    ran: dict[str, float] = defaultdict(float)
    for each in spans:
        if each.started is not None and each.ended is not None:
            ran[each.slot] += each.ended - each.started
    total = sum(ran.values())
    yield f"{total:.1f} s of stages in {whole:.1f} s: {total / whole:.2f} at a time"
    for slot, seconds in sorted(ran.items()):
        if not slot.endswith(("thread", "threads")):
            yield f"{slot}: {seconds / whole:.2f} at a time"
