"""Several processes that share every batch, for real, under torchrun with gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd.data import Augment
from kd.train.plan import batch_of
from tests.train.fit_here import fitted

PROJECT = Path(__file__).parents[2]


def fitted_by_two(settings: dict[str, object]) -> dict[str, object]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.train.fit_here", json.dumps(settings)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("taught", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_learns_from_the_same_batches(taught):
    settings = {"batch_size": 16, "mixup": 0.4 * taught, "taught": taught}
    alone, together = fitted(**settings), fitted_by_two(settings)
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert together["losses"] != alone["losses"]  # sums were taken in another order
    for name, values in alone["weights"].items():
        assert together["weights"][name] == pytest.approx(values, rel=1e-3, abs=1e-4), name


def test_shares_are_equal_disjoint_and_hold_the_pairs_that_mixup_mixes():
    batch = batch_of(0, 16, 100, Augment(shift=2), seed=0)
    shares = [batch.share(index, 4) for index in range(4)]
    everyone = torch.cat([each.indices_B for each in shares])
    assert sorted(everyone.tolist()) == sorted(batch.indices_B.tolist())
    partner = dict(zip(batch.indices_B.tolist(), batch.indices_B.flip(0).tolist(), strict=True))
    for each in shares:
        assert len(each.indices_B) == 4
        mirrored = each.indices_B.flip(0).tolist()
        assert [partner[index] for index in each.indices_B.tolist()] == mirrored
        wanted = [batch.views_B[batch.indices_B == index].item() for index in each.indices_B]
        assert each.views_B.tolist() == wanted
