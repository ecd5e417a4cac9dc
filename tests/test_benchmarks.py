"""The benchmarks still run: those of a GPU (docs/training.md) on a pretended one, others in small.

Not benchmarks/orchestration.py, which takes minutes, nor cached_views.py, which needs CIFAR-10.
"""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parents[1]
SMALL = {
    "train_step": ("--steps 1 --rounds 1 --models CNN-2", ["CNN-2"] * 4),
    "ensemble_targets": (
        "--members 2 2 2 --steps 1 --rounds 1",
        ["labels", "cached", "on-line", "on-line, unfolded", "on-line, all at once"],
    ),
    "streaming": (
        "--batch 8 --side 32 --images 32 --steps 2 --rounds 1",
        ["held on the device", "read from disk"],
    ),
    "grouped": ("--rounds 1 --students 2", ["digits, 16 x 16, half width", "digits, 16 x 16"]),
}
"""What makes each short, and the first rows of its table."""
COMMANDS = dict(
    re.findall(
        r"^python (benchmarks/(\w+)\.py .*)$", (PROJECT / "docs/training.md").read_text(), re.M
    )
)
COMMANDS = {script: command.replace(" --compile", "") for command, script in COMMANDS.items()}


ELSEWHERE = {
    "de_sampler.py --quick": f"Bars measured: {[*range(1, 12)]};",  # held or not
    "peers.py --small --rounds 1 --precisions fp32": "| kd, online, fp32 | ",
    "exports.py --epochs 1 --seconds 0.05 --skip-224": "| ResNet-20 | coreml int8 | ",
    "seeds.py --seeds 2": "| student - teacher | ",
    "servers.py --flows 2 --tasks 2 --rounds 1": "| 2 | PostgreSQL | ",
}
"""Those without a GPU, and how what they print last begins."""


def run(script, small):
    """Its exit status, the first cells of its rows, and all it said."""
    command = [*shlex.split(COMMANDS[script]), *small.split()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretended_gpu", *command],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    rows = [line.split(" | ")[0].removeprefix("| ") for line in done.stdout.splitlines()]
    return done.returncode, rows, done.stdout + done.stderr


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
]


@pytest.mark.parametrize("script", SMALL)
def test_a_gpus_steps_are_timed(script):
    small, wanted = SMALL[script]
    status, rows, said = run(script, small)
    assert status == 0, said
    start = rows.index("---") + 1
    assert rows[start : start + len(wanted)] == wanted, said


def test_the_protocol_keeps_its_figures_where_assistants_cannot_be_trained_at_once():
    """Here they cannot: another process has no pretended GPU, and a pretended one no streams."""
    status, rows, said = run("gpu_protocol", "--images 128 --epochs 1")
    assert status == 1, said
    at_once = ["assistants at once, processes", "assistants at once, streams"]
    start = rows.index("---") + 1
    assert rows[start:] == ["teacher", "assistants in turn", "student", "all of these", *at_once]
    assert said.count("failed:") == 2


@pytest.mark.parametrize("command", ELSEWHERE)
def test_the_other_benchmarks_run(command):
    done = subprocess.run(
        [sys.executable, *shlex.split(f"benchmarks/{command}")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith(ELSEWHERE[command]), done.stdout + done.stderr


def test_a_case_that_fails_is_left_out_and_the_others_are_timed(capsys):
    in_turns = runpy.run_path(str(PROJECT / "benchmarks/side_by_side.py"))["in_turns"]
    seconds = in_turns({"fails": lambda: 1 / 0, "works": lambda: None}, rounds=3)
    assert [(name, len(each)) for name, each in seconds.items()] == [("works", 3)]
    assert "fails: failed" in capsys.readouterr().err
