"""Run a comparison's units: one after the other in each process, in several processes."""

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
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
from kd.tables import DiskTables
from kd.train import NonFiniteLoss


def do(comparison: Comparison, unit: Unit) -> None:
    """Run one unit in its seed's workspace, unless it is done.

    Raises:
        Refused: another process is running it.
    """
    with locks.held(comparison.record(unit).with_suffix(".lock"), f"does {unit.id}"):
        if not comparison.is_done(unit):
            carry_out(comparison, unit)


def carry_out(comparison: Comparison, unit: Unit) -> None:
    """Run one unit, and record that it is done.

    A cell whose training diverges is recorded as such, which is a result too; all other errors
    are raised.
    """
    workspace = comparison.workspace(unit.seed)
    params, here = comparison.params[unit.seed], Path.cwd()
    resumed = note_begun(comparison, unit)
    # Stages look for their artifacts relative to the working directory.
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
    """Record that a unit was begun; returns whether it was before, so its seconds are partial."""
    path = comparison.record(unit)
    before = artifacts.read_json(path) if path.exists() else {}
    artifacts.write_json(path, {"begun": unit.digest})
    return before.get("begun") == unit.digest


def cpu_seconds() -> float:
    """CPU seconds of this process, without those spent on tables that are shared by units."""
    return time.process_time() - DiskTables.cpu_seconds


@contextlib.contextmanager
def naming(unit: Unit, log: IO[str]) -> Iterator[None]:
    """Add the unit's id to errors, and write their traceback to `log`."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {unit.id}")
        traceback.print_exception(error, file=log)
        raise


def reading_from(folder: Path, params: Params) -> Params:
    """The same experiment, with the data set's relative folder resolved against `folder`."""
    dataset = params.data.dataset
    if isinstance(dataset, Digits | CustomDataset):
        return params
    data, root = params.data, str(folder / Path(dataset.root).expanduser())
    source = root if data.source == dataset.root else data.source
    return replace(params, data=replace(data, source=source, dataset=replace(dataset, root=root)))


def do_all(comparison: Comparison, processes: int, say: Callable[[str], None]) -> None:
    """Run all unfinished units, each as soon as those it needs are done.

    If one fails, all units that do not depend on it are still run.

    Args:
        comparison: The comparison.
        processes: Units at a time, each with as many threads as its recipe says.
        say: Called with a line for each unit that is done or failed.

    Raises:
        Refused: units failed; its notes say which, and why.  Or a process was killed, as the
            system does where memory runs out.
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
                        with deaf_to_ctrl_c():  # submit() may start a process, which inherits it
                            started[pool.submit(do_unless_told, comparison, unit)] = unit
                done, _ = wait(started, return_when=FIRST_COMPLETED)
                for future in done:
                    unit = started[future]
                    if why := future.result():
                        failed[unit.id] = why
                    del started[future]
                    for id in needing(left, unit.id) if why else [unit.id]:
                        del left[id]
                    said = f"{unit.id} failed: {why}" if why else unit.id
                    say(f"{said} ({len(left)} left)")
        except BaseException as error:
            if not isinstance(error, Exception):  # a signal is passed on; an error is not
                for process in active_children():
                    process.terminate()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                ran = ", ".join(unit.id for unit in started.values())
                raise Refused(
                    f"a process was killed while these ran: {ran}; if memory ran out, "
                    f"give fewer --processes (now {processes}); the next run resumes"
                ) from None
            raise
    if failed:
        raise incomplete(comparison, failed)


def needing(units: Mapping[str, Unit], id: str) -> list[str]:
    """The id and those of all units that depend on it; `units` must be in dependency order."""
    found = [id]
    for unit in units.values():
        if not set(found).isdisjoint(unit.needs):
            found.append(unit.id)
    return found


def incomplete(comparison: Comparison, failed: Mapping[str, str]) -> Refused:
    """The error for a comparison with failed units; `failed` has their reasons by id."""
    error = Refused(
        f"{len(failed)} of {len(comparison.units)} units failed, so there is no table; units "
        "that need them were skipped, all others are done, and the next run resumes from there. "
        f"Tracebacks are in {comparison.folder}/seed-*/log.txt"
    )
    for id, why in failed.items():
        error.add_note(f"{id}: {why}")
    return error


@contextlib.contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Block SIGINT; processes started in the block inherit that, and we send them SIGTERM.

    On Ctrl-C a terminal signals all processes at once; one that is importing or sending a result
    would print a traceback, or return the exception as the result.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin(parent: int) -> None:
    """Initialise a worker: one thread each, unless a recipe sets another number for training."""
    import torch

    signal.signal(signal.SIGTERM, note)
    signals.end_with(parent)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def note(number: int, frame: FrameType | None) -> None:
    """Only record a signal, for the next unit to act on: raising would break the pool's code."""
    signals.told.append(number)


def do_unless_told(comparison: Comparison, unit: Unit) -> str:
    """Run a unit until SIGTERM; if one was received before, do not start.

    Returns:
        Why it failed, as a line, since not every exception can be pickled; "" if it succeeded.
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
