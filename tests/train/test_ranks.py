"""Several processes that share every batch, for real, under torchrun with gloo."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

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


@pytest.fixture
def one_rank():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5)])
def test_batch_norm_over_the_ranks_is_pytorchs_where_there_is_one(
    one_rank, shape, settings, dtype
):
    torch.manual_seed(0)
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    plain = nn.Sequential(kind(3, **settings))
    if plain[0].affine:
        nn.init.normal_(plain[0].weight)
        nn.init.normal_(plain[0].bias)
    ours = ranks.with_global_statistics(copy.deepcopy(plain))
    assert isinstance(ours[0], ranks.GlobalBatchNorm)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for training in (True, True, False):
        values = torch.randn(shape, dtype=dtype) + 2
        leaves = [values.clone().requires_grad_() for _ in range(2)]
        said = [
            model.train(training)(leaf) for model, leaf in zip((plain, ours), leaves, strict=True)
        ]
        upwards = torch.randn(shape, dtype=dtype)
        for each in said:
            each.backward(upwards)
        torch.testing.assert_close(said[1], said[0], **near)
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, **near)
    torch.testing.assert_close(dict(ours.state_dict()), dict(plain.state_dict()), **near)
    for found, wanted in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, **near)


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
