"""Doing a comparison's units: one after the other within a process, several processes at once."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from types import FrameType

from kd import artifacts, signals, stages, tracking
from kd.compare import locks
from kd.compare.plan import Comparison, Unit, plain_of
from kd.data import CustomDataset, Digits
from kd.params import Params
from kd.train import NonFiniteLoss


def do(comparison: Comparison, unit: Unit) -> None:
    """Run one unit in its seed's workspace, where its result is not there yet.

    Raises:
        Refused: another process does it at this moment.
    """
    with locks.held(comparison.record(unit).with_suffix(".lock"), f"does {unit.id}"):
        if not comparison.is_done(unit):
            carry_out(comparison, unit)


def carry_out(comparison: Comparison, unit: Unit) -> None:
    """Run one unit, and note that it is done.

    A cell whose training diverges is noted as such, which is a result too; anything else that
    goes wrong is raised.
    """
    workspace = comparison.workspace(unit.seed)
    params, here = comparison.params[unit.seed], Path.cwd()
    resumed = note_begun(comparison, unit)
    with naming(unit), inside(workspace), (workspace / "log.txt").open("a") as log:
        started, used, failed = time.time(), cpu_seconds(), dict[str, str]()
        tags = {"kd.comparison": comparison.about.name, "kd.seed": str(unit.seed)}
        with (
            contextlib.redirect_stdout(log),
            tracking.run(
                unit.stage,
                unit.name or None,
                params=plain_of(params, unit.stage, unit.name),
                tags={**tags, "kd.cell": unit.name if unit.stage == "baselines" else ""},
                enabled=params.tracking,
            ) as run,
        ):
            try:
                if unit.stage == "data":
                    params = reading_from(here, params)
                    stages.prepare_data(params, stages.read_data(params), run)
                else:
                    stages.STAGES[unit.stage](params, unit.name, run)
            except NonFiniteLoss as error:
                if unit.stage != "baselines":
                    raise
                failed = {"failed": str(error)}
        seconds = {"seconds": time.time() - started, "cpu_seconds": cpu_seconds() - used}
    record = {"digest": unit.digest, "resumed": resumed, **seconds, **failed}
    artifacts.write_json(comparison.record(unit), record)


def note_begun(comparison: Comparison, unit: Unit) -> bool:
    """Note that a unit was begun; whether it already was, so that its seconds will not be all."""
    path = comparison.record(unit)
    before = artifacts.read_json(path) if path.exists() else {}
    artifacts.write_json(path, {"begun": unit.digest})
    return before.get("begun") == unit.digest


def cpu_seconds() -> float:
    """Of this process, but for the tables that it made for all who ask the same members."""
    return time.process_time() - artifacts.DiskTables.cpu_seconds


@contextlib.contextmanager
def naming(unit: Unit) -> Iterator[None]:
    """Have errors say in which unit they arose."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {unit.id}")
        raise


def reading_from(folder: Path, params: Params) -> Params:
    """The same experiment, with the data set's folder named from the root."""
    dataset = params.data.dataset
    if isinstance(dataset, Digits | CustomDataset):
        return params
    data, root = params.data, str(folder / Path(dataset.root).expanduser())
    source = root if data.source == dataset.root else data.source
    return replace(params, data=replace(data, source=source, dataset=replace(dataset, root=root)))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, since stages find their artifacts from where they are run."""
    with contextlib.chdir(folder):
        yield


def do_all(comparison: Comparison, processes: int, say: Callable[[str], None]) -> None:
    """Do what is left to do, each unit as soon as those it needs are done.

    Args:
        comparison: What is compared.
        processes: Units at a time, each with as many threads as its recipe says.
        say: Told of each unit that is done.
    """
    left = {id: unit for id, unit in comparison.units.items() if not comparison.is_done(unit)}
    say(f"{comparison.about.name}: {len(left)} of {len(comparison.units)} units to do")
    started: dict[Future[None], Unit] = {}
    with ProcessPoolExecutor(processes, get_context("spawn"), begin, (os.getpid(),)) as pool:
        try:
            while left:
                running = {unit.id for unit in started.values()}
                for id, unit in left.items():
                    ready = id not in running and not any(need in left for need in unit.needs)
                    if ready and len(started) < processes:
                        with deaf_to_ctrl_c():  # and so is the process that this may start
                            started[pool.submit(do_unless_told, comparison, unit)] = unit
                done, _ = wait(started, return_when=FIRST_COMPLETED)
                for future in done:
                    unit = started.pop(future)
                    future.result()
                    del left[unit.id]
                    say(f"{unit.id} ({len(left)} left)")
        except BaseException as error:
            if not isinstance(error, Exception):  # what ends us ends them; a failure does not
                for process in active_children():
                    process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Keep Ctrl-C waiting; what is started meanwhile never hears it, for we tell it to stop.

    A terminal tells all processes at once, some of which would be importing, or handing on a
    result, in code that prints a traceback for it or takes it for the result.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin(parent: int) -> None:
    """A process works alone on its core; a recipe may say otherwise for its own training."""
    import torch

    signal.signal(signal.SIGTERM, note)
    signals.end_with(parent)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def note(number: int, frame: FrameType | None) -> None:
    """Leave it to the next unit to heed a signal: the pool's own code would not survive it."""
    signals.told.append(number)


def do_unless_told(comparison: Comparison, unit: Unit) -> None:
    """Run a unit, which SIGTERM ends, as it does one that has not begun."""
    signals.end_quietly()
    try:
        if signals.told:
            raise SystemExit(128 + signals.told[0])
        do(comparison, unit)
    finally:
        signal.signal(signal.SIGTERM, note)
