"""Run several processes (ranks) that train one network as if they were a single process.

torchrun's library starts and watches them.  This module makes them look like one process: a
single error message if all ranks fail, the exit status that one process would have, and ample
time for a rank to save a checkpoint when it is told to stop.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from kd import disk, signals

PATIENCE = 7 * 24 * 3600
"""Seconds before torchrun kills ranks that were told to stop; torch 2.11's default is 30."""
TOLD = "told"
"""The file by which ranks agree on who reports a failure; it holds the exit status."""


def run(command: Sequence[str], count: int) -> int:
    """Run `command` as `count` ranks, forwarding signals to them.

    Returns:
        The exit status that one process would have: that of the rank which failed first.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    environ = dict(os.environ)
    usual = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    heeded = [each.name for each, handler in usual.items() if handler != signal.SIG_IGN]
    logging.disable()  # torchrun would report each failure again
    with disk.temporary() as folder:
        os.environ["KD_RANKS"] = folder
        os.environ["KD_LAUNCHER"] = str(os.getpid())
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(PATIENCE)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="kd",
            max_restarts=0,
            rdzv_backend="c10d",
            # A file, not a port: launchers exchange pickles, and a port is open to everyone.
            rdzv_endpoint=f"{folder}/launchers",
            rdzv_configs={"store_type": "file", "keep_alive_interval": 3600},
            local_addr="localhost",
            logs_specs=DefaultLogsSpecs(folder),
            signals_to_handle=",".join(heeded),
        )
        try:
            elastic_launch(config, command[0])(*command[1:])
        except SignalException as heard:
            return 128 + heard.sigval
        except ChildFailedError as failed:
            told = Path(folder, TOLD)
            status: int = failed.get_first_failure()[1].exitcode
            if told.exists():
                return int(told.read_text())
            return status if status > 0 else 128 - status
        finally:
            logging.disable(logging.NOTSET)
            for number, handler in usual.items():
                signal.signal(number, handler)
            os.environ.clear()
            os.environ.update(environ)
    return 0


def is_first() -> bool:
    """Whether this process writes files and messages: it is the only one, or rank 0."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def become_rank() -> None:
    """Die with the launcher, and report an uncaught error only if this rank is first to fail."""
    signals.end_with(int(os.environ["KD_LAUNCHER"]))
    sys.excepthook = tell


def tell(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None = None
) -> None:
    """Print an uncaught exception if it is this rank's to report."""
    if not issubclass(kind, KeyboardInterrupt) and falls_first(1):
        sys.__excepthook__(kind, error, trace)


def falls_first(status: int) -> bool:
    """Whether this process, which exits with `status`, should report why.

    A lone process should, and of several ranks the first to fail: the others fail for the same
    reason, or because it did.
    """
    if "KD_RANKS" not in os.environ:
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends us by it when the first is gone
    try:
        with Path(os.environ["KD_RANKS"], TOLD).open("x") as told:
            told.write(str(status))
    except FileExistsError:
        return False
    return True
