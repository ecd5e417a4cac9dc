"""What people see: lines on a pipe, a bar on a terminal."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from kd.progress import Progress
from kd.train import Epoch

PROJECT = Path(__file__).parents[1]
SHOW = """
from kd.progress import Progress
from kd.train import Epoch
with Progress("student", epochs=2, steps=3) as progress:
    for done in range(1, 7):
        progress.step(done)
        if done % 3 == 0:
            progress.epoch(Epoch(number=done // 3, step=done, lr=0.1, train_loss=0.25,
                                 validation={"accuracy": 0.5}, images_per_second=1234.0))
"""


def test_elsewhere_an_epoch_is_a_plain_line(capsys):
    with Progress("student", epochs=4, steps=3) as progress:
        for done in (7, 8, 9):  # a run that was resumed in its third epoch
            progress.step(done)
        epoch = Epoch(number=3, step=9, lr=0.1, train_loss=0.25, images_per_second=1234.0)
        progress.epoch(epoch)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("student  epoch 3/4  loss 0.2500  1234 images/s  0 s left")


def test_on_a_terminal_a_bar_moves_below_the_lines():
    pytest.importorskip("rich", reason="of the extra pipeline")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    shown = subprocess.Popen(
        [sys.executable, "-c", SHOW], cwd=PROJECT, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 4096):
            text += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert shown.wait() == 0, text
    assert b"student  epoch 2/2  loss 0.2500  val accuracy 0.5000  1234 images/s" in text
    assert b"6/6" in text
    assert "\u2501".encode() in text  # the bar
