import os
import signal

import pytest

from kd.signals import told

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: results depend on it
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("DO_NOT_TRACK", "true")

# A shell has its background jobs ignore Ctrl-C, and their children inherit that: tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals_as_before():
    """Commands that a test runs in this process have it end at signals in their own way."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    told.clear()
