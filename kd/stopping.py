"""Stop a training by a signal, after it has saved its state."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from kd import signals
from kd.train import Stopped


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """In the block, SIGTERM and Ctrl-C only set a flag: training finishes its step, saves its
    state, and then the signal has its usual effect; a second signal has it at once.
    """
    if threading.current_thread() is not threading.main_thread():  # only it may handle signals
        yield lambda: False
        return
    heard = {number: signal.getsignal(number) for number in signals.ENDING}
    usual = {number: each for number, each in heard.items() if each != signal.SIG_IGN}
    asked = [*signals.told]

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, usual[signal.Signals(number)])

    for number in usual:
        signal.signal(number, note)
    try:
        yield lambda: bool(asked)
    except Stopped as stopped:
        with suppress(OSError):  # stdout may be closed, with whoever stopped us
            print(stopped, flush=True)
        # If another rank got the signal, this one has none.
        number = signal.Signals(asked[0]) if asked else signal.SIGTERM
        signal.signal(number, usual.get(number, signal.SIG_IGN))
        signal.raise_signal(number)
        raise
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
