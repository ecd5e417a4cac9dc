"""Doing a comparison's units: one after the other within a process, several processes at once."""

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from types import FrameType
from typing import IO

from kd import artifacts, signals, stages, tracking
from kd.compare import locks
from kd.compare.plan import Comparison, Unit
from kd.component import ConfigError, Refused, raised
from kd.data import CustomDataset, Digits
from kd.params import Params, of_stage
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
    # Stages find their artifacts from where they are run.
    with contextlib.chdir(workspace), (workspace / "log.txt").open("a") as log, naming(unit, log):
        started, used, failed = time.time(), cpu_seconds(), dict[str, str]()
        tags = {"kd.comparison": comparison.about.name, "kd.seed": str(unit.seed)}
        with (
            contextlib.redirect_stdout(log),
            tracking.run(
                unit.stage,
                unit.name or None,
                params=of_stage(params, unit.stage, unit.name),
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
def naming(unit: Unit, log: IO[str]) -> Iterator[None]:
    """Have errors say in which unit they arose, and leave their traceback in its log."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {unit.id}")
        traceback.print_exception(error, file=log)
        raise


def reading_from(folder: Path, params: Params) -> Params:
    """The same experiment, with the data set's folder named from the root."""
    dataset = params.data.dataset
    if isinstance(dataset, Digits | CustomDataset):
        return params
    data, root = params.data, str(folder / Path(dataset.root).expanduser())
    source = root if data.source == dataset.root else data.source
    return replace(params, data=replace(data, source=source, dataset=replace(dataset, root=root)))


def do_all(comparison: Comparison, processes: int, say: Callable[[str], None]) -> None:
    """Do what is left to do, each unit as soon as those it needs are done.

    Where one fails, all that do not need it are done all the same.

    Args:
        comparison: What is compared.
        processes: Units at a time, each with as many threads as its recipe says.
        say: Told of each unit that is done, or failed.

    Raises:
        Refused: units failed; its notes say which, and why.
    """
    left = {id: unit for id, unit in comparison.units.items() if not comparison.is_done(unit)}
    say(f"{comparison.about.name}: {len(left)} of {len(comparison.units)} units to do")
    started: dict[Future[str], Unit] = {}
    failed: dict[str, str] = {}
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
                    if why := future.result():
                        failed[unit.id] = why
                    for id in needing(left, unit.id) if why else [unit.id]:
                        del left[id]
                    said = f"{unit.id} failed: {why}" if why else unit.id
                    say(f"{said} ({len(left)} left)")
        except BaseException as error:
            if not isinstance(error, Exception):  # what ends us ends them; a failure does not
                for process in active_children():
                    process.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise incomplete(comparison, failed)


def needing(units: Mapping[str, Unit], id: str) -> list[str]:
    """A unit's id and those of all that need it, of units that each come after those they need."""
    found = [id]
    for unit in units.values():
        if not set(found).isdisjoint(unit.needs):
            found.append(unit.id)
    return found


def incomplete(comparison: Comparison, failed: Mapping[str, str]) -> Refused:
    """What a comparison ends with of which units failed, for the reasons given by their ids."""
    error = Refused(
        f"{len(failed)} of {len(comparison.units)} units failed, so that there is no table; what "
        "needs them was not done, all else is, and the next run goes on from there. "
        f"Tracebacks are in {comparison.folder}/seed-*/log.txt"
    )
    for id, why in failed.items():
        error.add_note(f"{id}: {why}")
    return error


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


def do_unless_told(comparison: Comparison, unit: Unit) -> str:
    """Run a unit, which SIGTERM ends, as it does one that has not begun.

    Returns:
        Why it failed, in one line, since not every exception can be sent; "" where it did not.
    """
    signals.end_quietly()
    try:
        if signals.told:
            raise SystemExit(128 + signals.told[0])
        do(comparison, unit)
    except Exception as error:
        own = isinstance(error, ConfigError | Refused)
        return (str(error) if own else raised(error)).partition("\n")[0]
    else:
        return ""
    finally:
        signal.signal(signal.SIGTERM, note)
