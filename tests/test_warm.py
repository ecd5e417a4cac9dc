"""The warm process: a stage that runs in a fork of it must not be told from one that does not."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from kd import warm
from tests.flows.toys import DVC, SOURCES, Toy, lives, pid_in, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pidfd and prctl")
SERVER = """
import sys
from kd import warm
warm.PRELOAD = ("kd.component",)
exec(warm.Server(sys.argv[1]).serve()[0])
"""
CLIENT = """
import os, sys
from kd import warm
os.environ["RUN"] = str(warm.pipeline_run())
status = warm.delegate(sys.argv[1:])
sys.exit(99 if status is None else status)
"""
DECLINED = 99
ENDLESS = "import os, time; open('PID', 'w').write(str(os.getpid())); time.sleep(600)"


@pytest.fixture
def socket_path() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own paths are too long for a socket
        yield f"{folder}/socket"


def start(folder: Path, *command: str, socket_path: str = "", **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SOURCES), "KD_WARM_SOCKET": socket_path, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def server(tmp_path: Path, socket_path: str) -> Iterator[subprocess.Popen[str]]:
    process = start(tmp_path, "-c", SERVER, socket_path)
    wait_until(lambda: os.path.exists(socket_path))
    yield process
    process.kill()
    process.communicate()


def client(folder: Path, code: str, socket_path: str, **env: str) -> subprocess.Popen[str]:
    return start(folder, "-c", CLIENT, code, socket_path=socket_path, **env)


@pytest.mark.usefixtures("server")
def test_streams_environment_and_exit_status_are_the_clients(
    tmp_path: Path, socket_path: str
) -> None:
    code = (
        "import os, sys; print(sys.stdin.read(), os.environ['MINE'], os.environ.get('OTHER')); "
        "print('err', file=sys.stderr); sys.exit(7)"
    )
    one = client(tmp_path, code, socket_path, MINE="1", OTHER="2")
    assert (*one.communicate("in"), one.returncode) == ("in 1 2\n", "err\n", 7)
    two = client(tmp_path, code, socket_path, MINE="3")
    assert (*two.communicate(""), two.returncode) == (" 3 None\n", "err\n", 7)


@pytest.mark.usefixtures("server")
def test_libraries_complaints_after_pythons_end_are_not_the_stages(
    tmp_path: Path, socket_path: str
) -> None:
    late = "import ctypes; ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).malloc_stats)"
    code = f"{late}; import sys; print('a word', end='', file=sys.stderr); sys.exit('and why')"
    stage = client(tmp_path, code, socket_path)
    assert (stage.communicate()[1], stage.returncode) == ("a wordand why\n", 1)


@pytest.mark.usefixtures("server")
def test_two_stages_run_at_once_and_a_death_by_signal_is_a_failure(
    tmp_path: Path, socket_path: str
) -> None:
    training = client(tmp_path, ENDLESS, socket_path)
    pid = pid_in(tmp_path / "PID")
    quick = client(tmp_path, "print('quick')", socket_path)
    assert (quick.communicate()[0], quick.returncode) == ("quick\n", 0)
    os.kill(pid, signal.SIGKILL)
    training.communicate()
    assert training.returncode == 128 + signal.SIGKILL


@pytest.mark.usefixtures("server")
def test_a_client_killed_by_force_leaves_no_child(tmp_path: Path, socket_path: str) -> None:
    training = client(tmp_path, ENDLESS, socket_path)
    pid = pid_in(tmp_path / "PID")
    training.kill()
    training.communicate()
    wait_until(lambda: not lives(pid))
    again = client(tmp_path, "print('still there')", socket_path)
    assert again.communicate()[0] == "still there\n"


@contextmanager
def halted(server: subprocess.Popen[str]) -> Iterator[None]:
    """While the block runs the server does not: what happens, it finds all at once."""
    server.send_signal(signal.SIGSTOP)
    wait_until(lambda: ") T " in Path(f"/proc/{server.pid}/stat").read_text())
    yield
    server.send_signal(signal.SIGCONT)


def ask(folder: Path, socket_path: str, code: str, share: float = 1.0) -> socket.socket:
    """A client's side of the line once it has sent so much of its request."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(socket_path)
    environ = {**os.environ, "PYTHONPATH": str(SOURCES)}
    request = json.dumps({"argv": [code], "cwd": str(folder), "environ": environ}) + "\n"
    if share:
        socket.send_fds(connection, [b"\n"], [0, 1, 2])
        connection.sendall(request[: int(share * len(request))].encode())
    return connection


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_client_that_dies_while_it_asks_harms_no_other(
    tmp_path: Path, socket_path: str, server: subprocess.Popen[str], share: float
) -> None:
    training = client(tmp_path, ENDLESS, socket_path)
    pid = pid_in(tmp_path / "PID")
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
    with halted(server):
        ask(tmp_path, socket_path, "__import__('time').sleep(600)", share).close()
    quick = client(tmp_path, "print('quick')", socket_path)
    assert quick.communicate()[0] == "quick\n"
    wait_until(lambda: children.read_text().split() == [str(pid)])
    training.kill()
    training.communicate()


def test_a_client_that_dies_as_its_stage_ends_harms_no_other(
    tmp_path: Path, socket_path: str, server: subprocess.Popen[str]
) -> None:
    training = client(tmp_path, ENDLESS, socket_path)
    pid = pid_in(tmp_path / "PID")
    with halted(server):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not lives(pid))
        other = ask(tmp_path, socket_path, "__import__('time').sleep(1)")
        training.kill()  # the server hears of it when it has given away the files' numbers
        training.communicate()
    assert other.makefile().read().split()[1:] == ["0"]
    other.close()


def test_a_source_that_is_gone_has_the_stage_declined(tmp_path: Path, socket_path: str) -> None:
    shutil.copytree(SOURCES / "kd", tmp_path / "kd")
    server = start(tmp_path, "-c", SERVER, socket_path, PYTHONPATH=str(tmp_path))
    wait_until(lambda: os.path.exists(socket_path))
    training = client(tmp_path, ENDLESS, socket_path, PYTHONPATH=str(tmp_path))
    pid = pid_in(tmp_path / "PID")
    (tmp_path / "kd" / "component.py").unlink()
    after = client(tmp_path, "", socket_path, PYTHONPATH=str(tmp_path))
    after.communicate()
    assert after.returncode == DECLINED
    assert lives(pid)
    server.kill()
    server.communicate()
    training.communicate()


def catches(process: int, number: int) -> bool:
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    assert caught
    return bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.usefixtures("server")
def test_sigterm_reaches_the_stage_which_may_end_its_records(
    tmp_path: Path, socket_path: str
) -> None:
    handler = "import signal, sys; signal.signal(15, lambda *_: (print('closed'), sys.exit(5)));"
    training = client(tmp_path, handler + ENDLESS, socket_path)
    pid = pid_in(tmp_path / "PID")
    wait_until(lambda: catches(training.pid, signal.SIGTERM))  # it learns the PID after the fork
    training.terminate()
    assert (training.communicate()[0], training.returncode) == ("closed\n", 5)
    assert not lives(pid)


def test_a_server_killed_by_force_takes_its_children_along_and_the_stage_fails(
    tmp_path: Path, socket_path: str, server: subprocess.Popen[str]
) -> None:
    training = client(tmp_path, ENDLESS, socket_path)
    pid = pid_in(tmp_path / "PID")
    server.kill()
    said = training.communicate()[1]
    assert training.returncode == 1
    assert "the warm process that ran this stage was killed" in said
    wait_until(lambda: not lives(pid))
    later = client(tmp_path, "", socket_path)
    later.communicate()
    assert later.returncode == DECLINED


def test_a_stage_does_not_go_on_while_the_server_of_a_dead_dvc_ends(
    tmp_path: Path, socket_path: str
) -> None:
    owner = start(tmp_path, "-c", "input()")
    slow = "import atexit, time; atexit.register(time.sleep, 600)\n"  # as Python's end with torch
    code = slow + SERVER.replace("(sys.argv[1])", "(*sys.argv[1:2], int(sys.argv[2]))")
    server = start(tmp_path, "-c", code, socket_path, str(owner.pid))
    wait_until(lambda: os.path.exists(socket_path))
    training = client(tmp_path, ENDLESS, socket_path)
    pid = pid_in(tmp_path / "PID")
    owner.kill()
    for each in (owner, training, server):
        each.communicate(timeout=60)
    wait_until(lambda: not lives(pid))


@pytest.mark.usefixtures("server")
def test_what_could_tell_a_fork_from_a_fresh_process_is_declined(
    tmp_path: Path, socket_path: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    declined = [
        client(tmp_path / "elsewhere", "", socket_path),
        client(tmp_path, "", socket_path, OMP_NUM_THREADS="17"),
        client(tmp_path, "", socket_path, PYTHONHASHSEED="1"),
        client(tmp_path, "", f"{socket_path}-nowhere"),
    ]
    for each in declined:
        each.communicate()
    assert [each.returncode for each in declined] == [DECLINED] * 4


def test_code_that_was_edited_after_the_server_started_is_not_run_from_memory(
    tmp_path: Path, socket_path: str
) -> None:
    shutil.copytree(SOURCES / "kd", tmp_path / "kd")
    server = start(tmp_path, "-c", SERVER, socket_path, PYTHONPATH=str(tmp_path))
    wait_until(lambda: os.path.exists(socket_path))
    before = client(tmp_path, "", socket_path, PYTHONPATH=str(tmp_path))
    before.communicate()
    with (tmp_path / "kd" / "component.py").open("a") as source:
        source.write("# edited\n")
    after = client(tmp_path, "", socket_path, PYTHONPATH=str(tmp_path))
    after.communicate()
    server.kill()
    server.communicate()
    assert (before.returncode, after.returncode) == (0, DECLINED)


FORK_OF = (
    "import os; said = os.getpid(), os.getppid(), os.environ['RUN']; "
    "open({file!r}, 'w').write('|'.join(map(str, said)))"
)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """A pipeline whose stages ask for a warm process that imports in no time."""
    pytest.importorskip("dvc", reason="of the extra pipeline")
    shutil.copytree(SOURCES / "kd", tmp_path / "code" / "kd")
    source = tmp_path / "code" / "kd" / "warm.py"
    source.write_text(
        re.sub(r"PRELOAD = \(.*\)", 'PRELOAD = ("kd.component",)', source.read_text())
    )
    main = tmp_path / "code" / "kd" / "__main__.py"
    main.write_text("def run(argv):\n    exec(argv[0])\n    return 0\n")
    (tmp_path / "client.py").write_text(CLIENT)
    root = tmp_path / "toy"
    root.mkdir()
    for command in (["git", "init", "-q"], [*DVC, "init", "-q"]):
        subprocess.run(command, cwd=root, check=True)
    return Toy(root)


def repro(toy: Toy, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DVC, "repro"],
        cwd=toy.root,
        env={**os.environ, "PYTHONPATH": str(toy.root.parent / "code"), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stage(name: str, code: str, **more: Any) -> dict[str, Any]:
    command = shlex.join([sys.executable, "../client.py", code])
    return {"cmd": command, "outs": [f"{name}.txt"], **more}


def test_all_stages_of_one_dvc_repro_are_forked_from_one_process_that_ends_with_it(
    toy: Toy,
) -> None:
    first = stage("first", FORK_OF.format(file="first.txt"))
    second = stage("second", FORK_OF.format(file="second.txt"), deps=["first.txt"])
    toy.write({"first": first, "second": second})
    running = repro(toy)
    said, _ = running.communicate()
    assert running.returncode == 0, said
    (pid, server, name), (other_pid, *same) = (
        toy.path(f"{each}.txt").read_text().split("|") for each in ("first", "second")
    )
    assert same == [server, name]
    assert pid != other_pid
    began = datetime.strptime(name, "dvc %Y-%m-%d %H:%M:%S")
    assert abs((datetime.now() - began).total_seconds()) < 60
    wait_until(lambda: not lives(int(server)))
    assert not list(toy.path(".kd").glob("warm-*"))


def test_a_dvc_killed_by_force_leaves_neither_the_stage_nor_the_warm_process(toy: Toy) -> None:
    server = "open('SERVER', 'w').write(str(__import__('os').getppid())); "
    toy.write({"train": stage("train", server + ENDLESS)})
    running = repro(toy)
    pid = pid_in(toy.path("PID"))
    running.kill()
    wait_until(lambda: not lives(pid))
    wait_until(lambda: not lives(pid_in(toy.path("SERVER"))))
    running.communicate()


ALONE = """
import sys
from kd import __main__
__main__.run = lambda argv: exec(argv[0])
__main__.main()
"""


@pytest.mark.parametrize("then", ["", "; true"])
def test_a_dvc_killed_by_force_takes_a_stage_along_that_no_warm_process_runs(
    toy: Toy, then: str
) -> None:
    """With a command to follow, every shell stays between the two, as dash always does."""
    toy.path("alone.py").write_text(ALONE)
    command = shlex.join([sys.executable, "alone.py", ENDLESS]) + then
    toy.write({"train": {"cmd": command, "outs": ["train.txt"]}})
    running = repro(toy, KD_WARM="0", PYTHONPATH=str(SOURCES))
    pid = pid_in(toy.path("PID"))
    running.kill()
    wait_until(lambda: not lives(pid))
    running.communicate()


def test_a_socket_that_a_killed_warm_process_left_is_swept_by_the_next_dvc(toy: Toy) -> None:
    server = "open('SERVER', 'w').write(str(__import__('os').getppid())); "
    toy.write({"train": stage("train", server + ENDLESS)})
    running = repro(toy)
    pid_in(toy.path("PID"))
    os.kill(pid_in(toy.path("SERVER")), signal.SIGKILL)
    running.communicate()
    (left_over,) = toy.path(".kd").glob("warm-*")
    mine = toy.path(f".kd/warm-{os.getpid()}-{warm.process_state(os.getpid())[warm.BORN]}")
    mine.touch()
    toy.write({"first": stage("first", FORK_OF.format(file="first.txt"))})
    running = repro(toy)
    said, _ = running.communicate()
    assert running.returncode == 0, said
    assert not left_over.exists()
    assert mine.exists()


def test_no_warm_process_is_started_where_none_is_wanted_or_no_dvc_runs_the_stage(
    toy: Toy,
) -> None:
    toy.write({"first": stage("first", FORK_OF.format(file="first.txt"))})
    running = repro(toy, KD_WARM="0")
    said, _ = running.communicate()
    assert f"exited with {DECLINED}" in said
    alone = client(toy.root, "", "")
    alone.communicate()
    assert alone.returncode == DECLINED
    assert not toy.path(".kd").exists()


@pytest.mark.slow
def test_real_stages_write_the_same_bytes_in_a_fork(tmp_path: Path, socket_path: str) -> None:
    def artifacts(folder: Path, used_socket: str) -> dict[str, str]:
        for stage in ("data", "teacher"):
            done = start(folder, "-m", "kd", stage, socket_path=used_socket)
            assert (done.communicate()[1], done.returncode) == ("", 0)
        files = [each for each in (folder / "artifacts").rglob("*") if each.is_file()]
        return {
            str(each.relative_to(folder)): hashlib.sha256(each.read_bytes()).hexdigest()
            for each in files
            if "runs" not in each.parts
        }

    params = (SOURCES / "params.yaml").read_text()
    for old, new in (("tracking: true", "tracking: false"), ("epochs: 20", "epochs: 2")):
        assert old in params
        params = params.replace(old, new)
    for name in ("plain", "warm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.yaml").write_text(params)
    plain = artifacts(tmp_path / "plain", "")
    server = start(tmp_path / "warm", "-m", "kd.warm", socket_path)
    wait_until(lambda: os.path.exists(socket_path))
    warm = artifacts(tmp_path / "warm", socket_path)
    server.kill()
    assert server.communicate() == ("", "")
    assert plain == warm
    assert "artifacts/teacher/model.safetensors" in warm
