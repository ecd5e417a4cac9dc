"""A process that has already imported torch, and forks a copy of itself for each stage.

Importing torch takes seconds of CPU, in each of the pipeline's many processes.  The flow starts
one `python -m kd.warm SOCKET`, and `python -m kd ...` finds it through KD_WARM_SOCKET; under
`dvc repro` the first stage starts one, which ends with that `dvc`.  `python -m kd ...` sends it
its arguments, folder, environment and standard streams, and a fork of the warm process runs the
stage as a fresh process would.  It declines if that might make a difference (other code on disk,
another folder, variables that libraries read at load).  Then, or if there is none, or if
KD_WARM is 0, the stage runs in its own process.  Linux only.
"""

import atexit
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from kd import signals

PRELOAD = ("torch", "torch._dynamo", "safetensors.torch", "kd.stages", "kd.params", "kd.__main__")
"""Creating an optimiser imports torch._dynamo, which takes as long as torch itself."""
READ_ON_LOAD = (
    *("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "ATEN_"),
    *("TORCH_", "PYTORCH_", "PYTHON", "LD_"),
)
"""Prefixes of variables that took effect when the warm process started."""
PARENT, BORN = 1, 19
"""Their positions in /proc/PID/stat, counted from the process's state, after its name."""


def delegate(argv: list[str]) -> int | None:
    """Have the warm process run `kd` with `argv`; the exit status, or None if it did not."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(os.environ.get("KD_WARM_SOCKET") or beside_dvc())
        socket.send_fds(connection, [b"\n"], [0, 1, 2])
        request = {"argv": argv, "cwd": os.getcwd(), "environ": dict(os.environ)}
        connection.sendall(json.dumps(request).encode() + b"\n")
        answers = connection.makefile()
        child = int(answers.readline())
    except (OSError, ValueError):
        connection.close()
        return None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(child, received))
    status = answers.readline()
    if not status:
        print("error: the warm process that ran this stage was killed", file=sys.stderr)
        return 1
    return int(status)


def beside_dvc() -> str:
    """The socket of this `dvc`'s warm process, which the first of its stages starts.

    Raises:
        OSError: none is wanted: no `dvc` runs us, or KD_WARM is 0.
    """
    if os.environ.get("KD_WARM") == "0":
        raise OSError("not wanted")
    owner, born = running_dvc()
    path = (
        f".kd/warm-{owner}-{born}"  # relative, since a socket's path is limited to 100 characters
    )
    if not os.path.exists(path):
        os.makedirs(".kd", exist_ok=True)
        sweep()
        command = [sys.executable, "-m", "kd.warm", path, str(owner)]
        with open(".kd/warm.log", "w") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the stage, which forwards it
            )
        while not os.path.exists(path) and process.poll() is None:
            time.sleep(0.01)
    return path


def sweep() -> None:
    """Remove the sockets of warm processes that were killed before their `dvc` ended."""
    for left_over in Path(".kd").glob("warm-*-*"):
        owner, born = map(int, left_over.stem.split("-")[1:])
        try:
            lives = process_state(owner)[BORN] == born
        except OSError:
            lives = False
        if not lives:
            left_over.unlink(missing_ok=True)


def running_dvc() -> tuple[int, int]:
    """The `dvc` that runs us: its process, and when that started, in clock ticks since boot.

    DVC sets DVC_STAGE for a stage's processes, so `dvc` is the nearest ancestor without it.

    Raises:
        OSError: none runs us, or this is not Linux.
    """
    if "DVC_STAGE" not in os.environ:
        raise ProcessLookupError("no dvc")
    process = os.getppid()
    while b"\0DVC_STAGE=" in b"\0" + Path(f"/proc/{process}/environ").read_bytes():
        process = process_state(process)[PARENT]
    return process, process_state(process)[BORN]


def end_with_dvc() -> None:
    """Kill this process when the `dvc` that runs it dies, as forks of the warm process are.

    The kernel would do so for a parent, but that may be a shell: dash, unlike bash, stays.
    """
    try:
        dvc = os.pidfd_open(running_dvc()[0])
    except OSError:  # none runs us, or this is not Linux
        return

    def end() -> None:
        select.select([dvc], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()


def pipeline_run() -> str | None:
    """A name for this run of `dvc repro`, by its start time; None if no `dvc` runs us."""
    try:
        ticks = running_dvc()[1]
        booted = next(
            int(line.split()[1])
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime ")
        )
    except OSError:
        return None
    began = booted + ticks // os.sysconf("SC_CLK_TCK")
    return time.strftime("dvc %Y-%m-%d %H:%M:%S", time.localtime(began))


def process_state(process: int) -> list[int]:
    """The fields of /proc/PID/stat after the process's name; its state, a letter, as 0."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return [0, *map(int, words[1:])]


class Server:
    """Serves one socket in one thread, since a fork copies no other."""

    def __init__(self, path: str, owner: int | None = None) -> None:
        """Listen before the long imports, so that stages started meanwhile wait for them.

        Args:
            path: Where to put the socket.
            owner: A process to end with.
        """
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{path}.new")
        self.listener.listen(64)
        os.rename(f"{path}.new", path)  # it appears once it can be used
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        if owner is not None:
            self.selector.register(os.pidfd_open(owner), selectors.EVENT_READ, self.leave)
        self.clients: dict[int, socket.socket] = {}
        """Connections of waiting clients, by their child's pidfd."""
        self.loaded_in = os.environ.copy()
        self.folder = os.getcwd()
        atexit.register(hush)  # before the imports, so that it comes after what they register
        for name in PRELOAD:
            importlib.import_module(name)
        self.code = versions()
        gc.freeze()  # else garbage collection in a child copies all pages

    def serve(self) -> list[str]:
        """Fork for each request.  Returns only in the children: the arguments to run with."""
        while True:
            for key, _ in self.selector.select()[:1]:  # may close what the others refer to
                request = key.data(key.fileobj)
                if request and (child := self.fork(request)) is not None:
                    return child

    def accept(self, listener: socket.socket) -> dict[str, Any] | None:
        """Accept a request, with its connection and streams; None if declined."""
        connection, _ = listener.accept()
        streams: list[int] = []
        with suppress(OSError, ValueError):  # the client died, or a source file is gone
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            request: dict[str, Any] = json.loads(connection.makefile().readline())
            if streams and self.suits(request):
                return {**request, "connection": connection, "streams": streams}
        for each in streams:
            os.close(each)
        connection.close()
        return None

    def leave(self, owner: int) -> None:
        """Exit because the owner did; what still runs for it dies with us.

        At once: Python's own end, with torch loaded, leaves a stage seconds to train on in.
        """
        os.unlink(self.path)
        os._exit(0)

    def suits(self, request: dict[str, Any]) -> bool:
        """Whether a fork would do the same as the process that asks for it."""
        now, then = (
            {key: value for key, value in environ.items() if key.startswith(READ_ON_LOAD)}
            for environ in (request["environ"], self.loaded_in)
        )
        same = now == then and request["cwd"] == self.folder and self.code == versions()
        return same and threading.active_count() == 1

    def fork(self, request: dict[str, Any]) -> list[str] | None:
        """The arguments in the child; None in the parent, which watches child and client."""
        connection, streams = request["connection"], request["streams"]
        parent = os.getpid()
        if child := os.fork():
            for each in streams:
                os.close(each)
            self.watch(child, connection)
            return None
        signals.end_with(parent)
        for each in (self.selector, self.listener, *self.clients.values(), connection):
            each.close()
        for target, each in enumerate(streams):
            os.dup2(each, target)
            os.close(each)
        os.environ.clear()
        os.environ.update(request["environ"])
        arguments: list[str] = request["argv"]
        return arguments

    def watch(self, child: int, connection: socket.socket) -> None:
        """Have `report` called when the child ends, and `abandon` when the client does."""
        process = os.pidfd_open(child)
        self.clients[process] = connection
        with suppress(OSError):  # if the client is gone, `abandon` is called
            connection.sendall(f"{child}\n".encode())
        self.selector.register(process, selectors.EVENT_READ, self.report)
        self.selector.register(connection, selectors.EVENT_READ, lambda _: self.abandon(process))

    def report(self, process: int) -> None:
        """Tell the client, if it is still there, how its child ended."""
        ended = os.waitid(os.P_PIDFD, process, os.WEXITED)
        assert ended  # it is None under WNOHANG only
        self.selector.unregister(process)
        if connection := self.clients.pop(process, None):
            status = ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status
            with suppress(OSError):
                connection.sendall(f"{status}\n".encode())
            self.selector.unregister(connection)
            connection.close()
        os.close(process)

    def abandon(self, process: int) -> None:
        """Kill the child of a client that died (a client never sends anything else)."""
        if connection := self.clients.pop(process, None):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            self.selector.unregister(connection)
            connection.close()


def hush() -> None:
    """Discard what libraries print after Python's end: all errors have been reported by then.

    What is frozen is not freed, which saves each fork a second of CPU; but Triton's bindings
    (3.9, with PyTorch 2.15) report it as "leaked", in a dozen lines.
    """
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def versions() -> dict[str, tuple[int, int]]:
    """Modification time and size of each loaded source file of kd's."""
    package = str(Path(__file__).parent)
    files = [getattr(each, "__file__", None) or "" for each in list(sys.modules.values())]
    states = {each: os.stat(each) for each in files if each.startswith(package)}
    return {each: (state.st_mtime_ns, state.st_size) for each, state in states.items()}


def main(path: str, owner: str | None = None) -> int:
    """Serve until killed, or until the process `owner` ends; in each fork, run one stage."""
    argv = Server(path, int(owner) if owner else None).serve()
    sys.argv = ["kd", *argv]
    run: Any = importlib.import_module("kd.__main__").run
    status: int = run(argv)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
