"""`python -m flows.pipeline` as a process of its own, ended in every way a process can be."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

from flows import locks
from kd import STAGES
from tests.flows.toys import SOURCES, Toy, endless, lives, pid_in, timed, wait_until

TWO = {"one": timed("one", 0), "two": timed("two", 0, deps=["one.txt"])}


def test_a_flow_after_dvc_repro_says_that_there_is_nothing_to_do(toy: Toy) -> None:
    toy.write(TWO)
    toy.dvc("repro")
    code = (
        "import sys; from flows.pipeline import main; status = main(); "
        "assert not {'prefect', 'torch', 'mlflow'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=toy.root,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Nothing to do: all 2 stages are up to date." in done.stdout


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("flows.pipeline", "prefect", "pipeline"),
        ("flows.worker gpu", "dvc", "pipeline"),
        ("flows.stack status", "supervisor", "stack"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, command, package, extra) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{package!r}] = None")
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCES}"},
        capture_output=True,
        text=True,
    )
    said = f"this needs the package '{package}', which is not installed"
    assert done.stderr == f"error: {said}; run: pip install 'kd[{extra}]'\n"
    assert done.returncode == 1


def test_a_key_that_no_stage_reads_is_refused_before_anything_runs(toy: Toy) -> None:
    toy.write({stage: timed(stage, 0) for stage in STAGES})
    text = (SOURCES / "params.yaml").read_text()
    toy.path("params.yaml").write_text(text + "assistant: {}\n")
    said, _ = (process := toy.start()).communicate()
    assert process.returncode == 1
    assert said.startswith("error: params.yaml: ")
    assert "assistants" in said


def test_what_a_key_made_that_is_gone_is_named_also_where_nothing_is_to_do(toy: Toy) -> None:
    toy.write({stage: timed(stage, 0) for stage in STAGES})
    toy.path("params.yaml").write_text((SOURCES / "params.yaml").read_text())
    toy.dvc("repro")
    stray = toy.path("artifacts/assistants/gone/model.safetensors")
    stray.parent.mkdir(parents=True)
    stray.touch()
    said, _ = (process := toy.start()).communicate()
    assert process.returncode == 1
    assert said.startswith("error: artifacts/assistants/gone belongs to no key of params.yaml's ")
    assert stray.exists()


def test_a_folder_below_the_projects_root_is_refused_and_left_as_it_is(toy: Toy) -> None:
    toy.write(TWO)
    below = Toy(toy.path("docs"))
    below.root.mkdir()
    said, _ = (process := below.start()).communicate()
    assert process.returncode == 1
    assert said == f"error: no dvc.yaml is in {below.root}: run from the project's root\n"
    assert list(below.root.iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("taught_by: teacher", "taught_by: techer", "assistants.large.taught_by is 'techer'"),
        ("weights:\n", "wieghts:\n", "wieghts is not a known key; did you mean 'weights'?"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_before_dvc_stumbles_over_it(
    toy: Toy, prefect: str, old: str, new: str, said: str
) -> None:
    text = (SOURCES / "params.yaml").read_text()
    toy.write({stage: timed(stage, 0, params=[stage]) for stage in STAGES})
    toy.path("params.yaml").write_text(text)
    toy.dvc("repro")
    toy.path("params.yaml").write_text(text.replace(old, new, 1))
    made = toy.path("assistants.txt").read_text()
    shown, _ = (process := toy.start(PREFECT_API_URL=prefect)).communicate()
    assert process.returncode == 1
    assert shown.splitlines()[-1].startswith(f"error: params.yaml: {said}")
    assert toy.path("assistants.txt").read_text() == made


def test_a_run_against_a_running_server_shows_plan_lines_and_failure(
    toy: Toy, prefect: str
) -> None:
    toy.write(
        {
            "one": {"cmd": "echo epoch 1; echo > one.txt", "outs": ["one.txt"]},
            "two": {"cmd": "echo no space left; exit 3", "deps": ["one.txt"], "outs": ["two.txt"]},
            "three": timed("three", 0, deps=["two.txt"]),
            "own": {"cmd": "echo error: lr is -1 >&2; exit 2", "outs": ["own.txt"]},
        }
    )
    process = toy.start(PREFECT_API_URL=prefect)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    lines = [" ".join(each.split()) for each in said.splitlines()]
    assert lines[0] == "4 of 4 stages to run"
    assert "two never run" in lines
    # Of DVC's own lines, none that advises who runs it by hand.
    assert [each for each in lines if each.startswith("one |")] == [
        "one | starts on 1 thread",
        "one | Running stage 'one':",
        "one | > echo epoch 1; echo > one.txt",
        "one | epoch 1",
        "one | done",
    ]
    failed = lines.index("two | two ended with exit code 255")
    assert lines.index("two | no space left") < failed
    assert lines.count("two | no space left") == 1
    assert any(each.startswith("three not run") for each in lines)
    assert any(re.fullmatch(r"own failed \S+ s lr is -1", each) for each in lines)
    assert lines[-1] in {
        "error: own: lr is -1; 2 more not completed",
        "error: two: two ended with exit code 255; 2 more not completed",
    }
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_flow_told_to_end_leaves_no_training_and_starts_none(
    toy: Toy, prefect: str, number: signal.Signals
) -> None:
    toy.write({"train": endless("train"), "next": timed("next", 0, deps=["train.txt"])})
    process = toy.start(PREFECT_API_URL=prefect)
    pid = pid_in(toy.path("PID"))
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert not lives(pid)
    assert "Traceback" not in said
    assert "the next run continues from them" in said


STUBBORN = (
    "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: open('TOLD', 'w')); "
    "open('PID', 'w').write(str(os.getpid())); [time.sleep(1) for _ in range(600)]"
)


@pytest.mark.slow
def test_a_flow_told_twice_to_end_does_so_at_once_and_says_so(toy: Toy, prefect: str) -> None:
    stages = {name: timed(name, 0, deps=["train.txt"]) for name in ("one", "two")}
    toy.write({"train": {"cmd": f'python -c "{STUBBORN}"', "outs": ["train.txt"]}, **stages})
    process = toy.start(PREFECT_API_URL=prefect)
    pid = pid_in(toy.path("PID"))
    process.send_signal(signal.SIGINT)
    wait_until(toy.path("TOLD").exists)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "stopped at once; the next run continues from what is saved"
    wait_until(lambda: not lives(pid))


def test_a_flow_cancelled_in_prefect_ends_like_one_told_to_end_here(
    toy: Toy, prefect: str
) -> None:
    toy.write({"train": endless("train")})
    process = toy.start(PREFECT_API_URL=prefect)
    pid = pid_in(toy.path("PID"))
    cancel = urllib.request.Request(
        f"{prefect}/flow_runs/{toy.path('.kd/flow.run').read_text()}/set_state",
        json.dumps({"state": {"type": "CANCELLING"}}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(cancel).close()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert not lives(pid)
    assert said.splitlines()[-1].endswith("the next run continues from them")


SAVING = (
    "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), exit())); "
    "open('PID', 'w').write(str(os.getpid())); time.sleep(600)"
)


def test_a_flow_killed_by_force_leaves_no_training_and_the_next_one_runs(
    toy: Toy, prefect: str
) -> None:
    train = {"cmd": f'python -c "{SAVING}"', "deps": ["one.txt"], "outs": ["train.txt"]}
    toy.write({"one": timed("one", 0), "train": train})
    process = toy.start(PREFECT_API_URL=prefect)
    pid = pid_in(toy.path("PID"))
    first = toy.path("one.txt").read_text()
    process.kill()
    process.communicate()
    with locks.workspace(toy.root):
        assert not lives(pid)  # who works here next waits for it
    with locks.slots().take(threads=8, gpu=False, stop=threading.Event()):
        pass  # every slot is free again
    killed = toy.path(".kd/flow.run").read_text()
    toy.write({"one": timed("one", 0), "train": timed("train", 0, deps=["one.txt"])})
    again = toy.start(PREFECT_API_URL=prefect)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert toy.path("one.txt").read_text() == first  # what was finished stays
    assert toy.status() == {}
    with urllib.request.urlopen(f"{prefect}/flow_runs/{killed}") as answer:
        assert json.load(answer)["state"]["type"] == "CRASHED"  # the next run told the server


def test_a_server_that_does_not_answer_is_named_at_once(toy: Toy) -> None:
    toy.write(TWO)
    with socket.socket() as taken:  # so that nobody else can listen there
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        process = toy.start(PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"PREFECT_API_URL is http://127.0.0.1:{port}/api, and no Prefect server" in said
    assert not toy.path("one.txt").exists()


def test_a_broken_dvc_yaml_is_an_error_without_a_traceback(toy: Toy) -> None:
    toy.path("dvc.yaml").write_text("stages: {one: {cmdd: true}}")
    process = toy.start()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: " in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_without_a_server_and_in_a_cold_home_one_command_does_it_all(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in [each for each in os.environ if each.startswith("PREFECT_")]:
        monkeypatch.delenv(key)
    toy.write(TWO)
    # A locale that is not UTF-8, which Python would otherwise replace; a proxy that is not there.
    odd = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = toy.start(**odd, http_proxy="http://127.0.0.1:9", NO_PROXY="host.example")
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert not {"Traceback", "CancelledError", "WARNING"} & set(said.split())
    assert toy.path(".kd/prefect/prefect.db").exists()
    assert toy.path(".kd/prefect/server.log").read_text() == ""
    assert toy.status() == {}
