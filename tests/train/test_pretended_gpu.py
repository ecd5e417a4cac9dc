"""What a machine without a GPU can tell of one: tests/pretended_gpu.py says how."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    "file", ["test_devices.py", pytest.param("test_loop.py", marks=pytest.mark.slow)]
)
def test_what_must_hold_on_every_device_holds_on_a_gpu(file):
    """In a process of its own, which is left with one more kind of device."""
    chosen = ["-m", "not slow", "-k", "gpu or cuda", f"tests/train/{file}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.pretended_gpu", *chosen],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    assert "no GPU\n" not in done.stdout
