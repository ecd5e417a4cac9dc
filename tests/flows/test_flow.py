"""The flow in this process, against a real server that started on a fresh database."""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flows import locks
from tests.flows.toys import (
    FOREIGN_WARNINGS,
    SOURCES,
    Toy,
    endless,
    lives,
    pid_in,
    timed,
    wait_until,
)

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

pytestmark = FOREIGN_WARNINGS


@pytest.fixture
def run(toy: Toy, prefect: str) -> Callable[[], "State"]:
    from flows.flow import pipeline  # after `prefect` has set its environment

    return lambda: pipeline(str(toy.root), return_state=True)


def task_runs(state: "State") -> dict[str, list[Any]]:
    """The state's task runs as the server has them: by name, state and attempt count."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    run_id = state.state_details.flow_run_id
    assert run_id
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
        )
    return {each.name: [each.state_name, each.run_count] for each in found}


def flow_state(state: "State") -> str | None:
    """The name of the flow run's state as the server has it."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(state.state_details.flow_run_id).state_name  # type: ignore[arg-type]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_stages_run_after_those_that_they_read_and_dvc_finds_nothing_left_to_do(
    toy: Toy, run: Callable[[], "State"]
) -> None:
    names = [f"part{number}" for number in range(3)]
    stages = {name: timed(name, 0, deps=["first.txt"]) for name in names}
    stages["first"] = timed("first", 0)
    stages["last"] = timed("last", 0, deps=[f"{name}.txt" for name in names])
    toy.write(stages)
    state = run()
    assert state.is_completed(), state.message
    assert toy.times("last")[0] > max(toy.times(name)[1] for name in names)
    assert toy.status() == {}
    assert "Running" not in toy.dvc("repro")


def test_eight_stages_that_end_at_one_instant_are_all_recorded(
    toy: Toy, run: Callable[[], "State"]
) -> None:
    """None would end if independent stages did not run at once."""
    wait = "touch at{0}; while [ $(ls | grep -c ^at) -lt 8 ]; do sleep 0.05; done; echo > {0}"
    names = [f"out{number}" for number in range(8)]
    toy.write({name: {"cmd": wait.format(name), "outs": [name]} for name in names})
    state = run()
    assert state.is_completed(), state.message
    assert toy.status() == {}
    assert "Running" not in toy.dvc("repro")


def test_a_failure_stops_what_depends_on_it_and_nothing_else(
    toy: Toy, run: Callable[[], "State"]
) -> None:
    toy.write(
        {
            "bad": {"cmd": "echo loss is nan at step 7; exit 3", "outs": ["bad.txt"]},
            "after": {"cmd": "touch after.txt", "deps": ["bad.txt"], "outs": ["after.txt"]},
            "other": timed("other", 0),
            "after_other": timed("after_other", 0, deps=["other.txt"]),
        }
    )
    state = run()
    assert state.is_failed()
    assert "bad" in (state.message or "")
    assert toy.path("after_other.txt").exists()
    assert not toy.path("after.txt").exists()
    assert set(toy.status()) == {"bad", "after"}


@pytest.mark.parametrize("command", ["echo 'error: the disk is full'; exit 1", "touch out"])
def test_a_full_disk_costs_the_timeline_and_hides_no_reason(
    toy: Toy, run: Callable[[], "State"], caplog: pytest.LogCaptureFixture, command: str
) -> None:
    toy.write({"one": {"cmd": command, "outs": ["out"]}})
    toy.path(".kd").mkdir(exist_ok=True)
    toy.path(".kd/timeline.txt").symlink_to("/dev/full")
    state = run()
    if "exit" in command:
        assert (state.message or "").endswith("one: the disk is full")
    else:
        assert state.is_completed()
    assert (
        f"{toy.path('.kd/timeline.txt')} was not written: No space left on device" in caplog.text
    )


def test_a_student_that_cannot_be_promoted_fails_the_run_and_says_why(
    toy: Toy, run: Callable[[], "State"], caplog: pytest.LogCaptureFixture
) -> None:
    toy.write({"student": timed("student", 0)})
    toy.path("params.yaml").write_bytes((SOURCES / "params.yaml").read_bytes())
    state = run()
    missing = "artifacts/student/manifest.json is missing: run `dvc repro student`"
    assert (state.message or "").endswith(
        "promote: every stage is up to date, but `kd promote` ended with exit code 2; "
        f"run it again: {missing}"
    )
    assert f"error: {missing}" in caplog.messages
    assert toy.status() == {}


def test_a_result_that_dvcs_cache_has_no_room_for_is_named(
    toy: Toy, run: Callable[[], "State"]
) -> None:
    # As DVC 3.67 says it where .dvc/cache is a full disk, which not everybody may mount.
    said = "failed to transfer '8649' - [Errno 28] No space left on device: 'out' -> '.dvc/cache'"
    toy.write({"one": {"cmd": f'echo "ERROR: {said}"; exit 1', "outs": ["out"]}})
    assert (run().message or "").endswith(f"one: {said}")


def test_a_failed_stage_is_run_again_as_often_as_its_meta_says(
    toy: Toy, run: Callable[[], "State"]
) -> None:
    command = "echo try >> ../tries; test $(wc -l < ../tries) -eq 3 && echo > out.txt"
    toy.write({"flaky": {"cmd": command, "outs": ["out.txt"], "meta": {"retries": 2}}})
    assert run().is_completed()
    assert (toy.root.parent / "tries").read_text().count("try") == 3


def test_a_stage_that_takes_too_long_is_ended(toy: Toy, run: Callable[[], "State"]) -> None:
    timeout = 3
    while not toy.path("PID").exists():  # a busy machine may take longer to start it
        timeout *= 2
        toy.write({"train": endless("train", meta={"timeout": timeout})})
        assert run().is_failed()
    assert not lives(pid_in(toy.path("PID")))


def test_inputs_edited_during_a_run_are_caught_and_the_stage_is_not_accepted(
    toy: Toy, run: Callable[[], "State"], caplog: pytest.LogCaptureFixture
) -> None:
    edit = "cp code trained; echo edited > code; sed -i 's/0.1/0.2/' params.yaml"
    toy.path("code").write_text("original")
    toy.write(
        {"train": {"cmd": edit, "deps": ["code"], "params": ["lr"], "outs": ["trained"]}}, lr=0.1
    )
    first = run()
    assert first.is_failed()
    assert "train: edited while it ran: code, lr." in caplog.text
    assert "train" in toy.status()
    # What DVC alone would have certified must not come back from the run-cache either.
    assert run().is_completed()
    assert toy.path("trained").read_text() == "edited\n"
    assert toy.status() == {}
    # The second run found the first one ended, and so left its state as it was.
    assert task_runs(first) == {"train": ["Failed", 1]}
    assert flow_state(first) == "Failed"


def test_a_second_flow_is_refused(toy: Toy, run: Callable[[], "State"]) -> None:
    toy.write({"one": timed("one", 0)})
    with locks.workspace(toy.root):
        state = run()
    assert state.is_failed()
    assert "WorkspaceBusyError" in (state.message or "")
    assert not toy.path("one.txt").exists()


def test_cancelling_on_the_server_ends_the_training(
    toy: Toy, run: Callable[[], "State"], prefect: str, caplog: pytest.LogCaptureFixture
) -> None:
    toy.write(
        {
            "train": endless("train", meta={"retries": 2}),
            "next": timed("next", 0, deps=["train.txt"]),
        }
    )

    def cancel() -> None:
        from prefect.client.orchestration import get_client
        from prefect.states import Cancelling

        pid_in(toy.path("PID"))
        with get_client(sync_client=True) as client:
            newest = max(client.read_flow_runs(), key=lambda each: each.created or 0)
            client.set_flow_run_state(newest.id, Cancelling())

    other = threading.Thread(target=cancel)
    other.start()
    state = run()
    other.join()
    assert state.is_cancelled()
    wait_until(
        lambda: task_runs(state)["train"] == ["Cancelled", 1]
    )  # the server hears of it later
    assert "stopped" in caplog.messages
    assert not any(record.exc_info for record in caplog.records)
    assert not lives(pid_in(toy.path("PID")))
    assert not toy.path("next.txt").exists()


def test_a_stage_knows_its_run_and_its_task_bears_its_name(
    toy: Toy, run: Callable[[], "State"], prefect: str
) -> None:
    command = "echo $KD_FLOW_RUN_ID $KD_TASK_RUN_ID > ids"
    each = {"foreach": ["a"], "do": {"cmd": command, "outs": ["ids"]}}
    toy.write({"each": each})
    state = run()
    flow_run_id, task_run_id = toy.path("ids").read_text().split()
    assert flow_run_id == str(state.state_details.flow_run_id)

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        task_run = client.read_task_run(task_run_id)  # type: ignore[arg-type]
    assert task_run.name == "each@a"


def test_the_report_and_the_tracked_runs_can_be_reached_from_the_flow_run(
    toy: Toy, run: Callable[[], "State"], prefect: str
) -> None:
    runs = toy.path("artifacts/runs")
    (runs / "assistants").mkdir(parents=True)
    for name in ("student", "teacher"):
        (runs / f"{name}.json").write_text(json.dumps({"url": f"http://there/{name}"}))
    (runs / "report.json").write_text(json.dumps({"run_id": None, "url": None}))
    read, made = "read.json", "artifacts/runs/assistants/Large_1.json"
    toy.path(read).write_text(json.dumps({"url": "http://there/assistants/Large_1"}))
    toy.path("artifacts/report").mkdir()
    toy.path("artifacts/report/report.md").write_text("| student | 0.9 |")
    one = {"cmd": f"cp {read} {made}", "deps": [read], "outs": [made]}
    toy.write({"assistants": {"foreach": ["Large_1"], "do": one}})
    state = run()

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = {
            each.key: each.data
            for each in client.read_artifacts()
            if each.flow_run_id == state.state_details.flow_run_id
        }
    assert found.pop("report") == "| student | 0.9 |"
    rows = str(found.pop("mlflow-runs")).splitlines()[2:]
    assert rows == [
        f"| {name} | [open](http://there/{name}) |"
        for name in ("teacher", "assistants/Large_1", "student")
    ]
    assert str(found.pop("plan")).splitlines()[2:] == ["| assistants@Large_1 | never run |"]
    drawn = r"```\nassistants@Large_1 +░*█+ +1 thread +\d+\.\d s\n\n"
    assert re.match(drawn, str(found.pop("timeline")))
    assert str(found.pop("stage-assistants-large-1")).splitlines() == [
        "[Its run in MLflow](http://there/assistants/Large_1)",
        "",
        "|  | DVC hash, or value |",
        "| --- | --- |",
        f"| made `{made}` | {md5(toy.path(made))} |",
        f"| read `{read}` | {md5(toy.path(read))} |",
    ]
    assert not found


def test_a_stage_that_failed_is_not_said_to_have_its_last_run_in_mlflow(
    toy: Toy, run: Callable[[], "State"], prefect: str
) -> None:
    (runs := toy.path("artifacts/runs")).mkdir(parents=True)
    for name in ("teacher", "student"):
        (runs / f"{name}.json").write_text(json.dumps({"url": f"http://there/{name}"}))
    toy.write(
        {
            "teacher": timed("teacher", 0),
            "student": {"cmd": "exit 3", "deps": ["teacher.txt"], "outs": ["student.txt"]},
        }
    )
    state = run()
    assert state.is_failed()

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        (links,) = (
            str(each.data)
            for each in client.read_artifacts()
            if each.flow_run_id == state.state_details.flow_run_id and each.key == "mlflow-runs"
        )
    assert links.splitlines()[2:] == ["| teacher | [open](http://there/teacher) |"]
