"""The picture of a run, drawn from what its tasks log."""

import logging

from flows.timeline import LOGGER, WIDTH, Span, Timeline, draw

HALF = WIDTH // 2


def test_each_stage_is_a_bar_from_when_it_was_ready_to_when_it_ended() -> None:
    spans = [
        Span("teacher", ready=5.0, started=5.0, slot="GPU 0", ended=29.0),
        Span("assistants@a", ready=29.0, started=29.0, slot="GPU 0", ended=53.0),
        Span("assistants@b", 29.0, 41.0, slot="2 threads", ended=53.0, state="failed"),
        Span("report", ready=53.0, ended=53.0, state="stopped"),
    ]
    drawn = draw(spans).splitlines()
    assert drawn[0] == "teacher       " + ("█" * HALF).ljust(WIDTH) + "  GPU 0          24.0 s"
    assert drawn[1] == "assistants@a  " + ("█" * HALF).rjust(WIDTH) + "  GPU 0          24.0 s"
    waited = ("░" * (HALF // 2) + "█" * (HALF // 2)).rjust(WIDTH)
    assert drawn[2] == (
        f"assistants@b  {waited}  2 threads      12.0 s  failed, after 12.0 s of waiting"
    )
    assert drawn[3].split() == ["report", "░", "no", "slot", "0.0", "s", "stopped"]
    assert drawn[5:] == ["60.0 s of stages in 48.0 s: 1.25 at a time", "GPU 0: 1.00 at a time"]


def test_a_stage_that_took_no_time_is_still_seen() -> None:
    spans = [
        Span("long", ready=0.0, started=0.0, slot="1 thread", ended=1000.0),
        Span("short", ready=1000.0, started=1000.0, slot="1 thread", ended=1000.0),
    ]
    bar = draw(spans).splitlines()[1]
    assert bar.startswith("short  " + "█".rjust(WIDTH) + "  1 thread")


def test_nothing_ran_and_nothing_is_drawn() -> None:
    assert draw([]) == ""


def test_the_tasks_log_tells_what_became_of_each_attempt_at_a_stage() -> None:
    def say(message: str, state: str | None = None, run: str = "this", stage: str = "one") -> None:
        extra = {"stage_state": state, "flow_run_id": run, "task_run_name": stage}
        logger.warning(message, extra=extra)

    logger = logging.getLogger(f"{LOGGER.name}.test")
    logger.propagate = True
    with Timeline("this") as times:
        for ending in ("failed", "done"):
            say("waits", "waiting")
            say("starts on GPU 1", "running")
            say("epoch 1")
            say("of another run", "failed", run="other")
            say(ending, ending)
        say("waits", "waiting", stage="two")
    say("after the run", "waiting", stage="three")
    drawn = times.draw().splitlines()
    assert [each.split()[0] for each in drawn[:3]] == ["one", "one", "two"]
    assert [each.slot for each in times.spans] == ["GPU 1", "GPU 1", "no slot"]
    assert [each.state for each in times.spans] == ["failed", "done", "stopped"]
