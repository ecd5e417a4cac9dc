"""Several processes that share every batch, for real, under torchrun with gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd.data import Augment
from kd.train import ranks
from kd.train.plan import batch_of
from tests.train.fit_here import fitted

PROJECT = Path(__file__).parents[2]


def by_two(what: str, folder: Path, **settings: object) -> list[dict[str, object]]:
    """What each of two ranks found."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun += ["--log-dir", str(folder / "ranks")]  # else a folder in /tmp that stays
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.train.fit_here", what, json.dumps(settings)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    assert found[0] == found[1]
    return found[0]


ALIKE = {
    "labels": {},
    "taught": {"taught": True, "mixup": 0.4},
    "idle": {"idle": True},
    "own mean": {"method": "OwnMean"},
    "peers": {"method": "DML"},
    "gated": {"method": "Gated", "taught": True},
    "gated idle": {"method": "Gated", "taught": True, "idle": True},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(ALIKE)[1:]]


@pytest.mark.parametrize("name", ["labels", *SLOW])
def test_two_processes_learn_what_one_learns_from_the_same_batches(name, tmp_path):
    settings = {"batch_size": 16, **ALIKE[name]}
    alone, together = fitted(**settings), by_two("fitted", tmp_path, **settings)
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert together != alone  # sums were taken in another order
    for name, values in alone["weights"].items():
        assert together["weights"][name] == pytest.approx(values, rel=1e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_all_stop_after_the_step_at_which_one_was_asked_to_and_go_on_to_the_same_bits(
    asked, tmp_path
):
    found = by_two("resumed", tmp_path, asked=asked)
    assert found["stopped"] == "stopped after step 6; run it again to go on"
    assert found["resumed"] == found["whole"]


@pytest.mark.slow
def test_a_method_that_compares_the_images_of_a_batch_is_refused(tmp_path):
    found = by_two("refused", tmp_path, method="DIST", taught=True)
    assert "recipe.devices is 2, but DIST compares images" in found["error"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_its_step(tmp_path):
    found = by_two("exploded", tmp_path, rank=1)
    assert "the loss was not finite at step 7 (epoch 2)" in found["error"]


def test_a_lone_process_waits_for_nobody():
    assert [ranks.any_rank(flag) for flag in (True, False)] == [True, False]
    assert ranks.mean_over_ranks(torch.tensor(3.0)) == 3.0


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
