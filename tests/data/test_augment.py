import pytest
import torch

from kd.component import ConfigError
from kd.data import Augment, order_for

GRID = [Augment(), Augment(flip=True), Augment(shift=1), Augment(shift=3, flip=True)]


@pytest.mark.parametrize("augment", GRID)
def test_every_view_is_another_shift_and_flip(augment: Augment) -> None:
    dy_V, dx_V, flip_V = augment.decode(torch.arange(augment.num_views))
    views = list(zip(dy_V.tolist(), dx_V.tolist(), flip_V.tolist(), strict=True))
    steps = range(-augment.shift, augment.shift + 1)
    flips = (False, True) if augment.flip else (False,)
    assert sorted(views) == sorted(
        (dy, dx, flip) for dy in steps for dx in steps for flip in flips
    )
    assert views[augment.identity] == (0, 0, False)


def test_views_and_order_are_pure_functions_pinned_for_resume() -> None:
    augment = Augment(shift=2, flip=True)
    assert torch.equal(augment.views_for(1, 2, 100), augment.views_for(1, 2, 100))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert augment.views_for(0, 0, 6).tolist() == [43, 43, 13, 2, 13, 41]
    assert order_for(0, 0, 6).tolist() == [3, 2, 0, 5, 4, 1]
    assert torch.equal(torch.get_rng_state(), state)


def test_neighbouring_seeds_and_epochs_share_nothing() -> None:
    keys = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    orders = {tuple(order_for(seed, epoch, 50).tolist()) for seed, epoch in keys}
    assert len(orders) == len(keys)
    assert all(sorted(order) == list(range(50)) for order in orders)
    augment = Augment(shift=4, flip=True)
    views = torch.stack([augment.views_for(seed, epoch, 200) for seed, epoch in keys])
    chance = 200 / augment.num_views
    same = [(views[a] == views[b]).sum().item() for a in range(16) for b in range(a)]
    assert sum(same) / len(same) < 3 * chance


def test_all_views_come_about_equally_often() -> None:
    augment = Augment(shift=1, flip=True)
    counts = torch.bincount(augment.views_for(0, 0, 18_000), minlength=18)
    chi_squared = ((counts - 1000) ** 2 / 1000).sum().item()
    assert chi_squared < 40.8  # 17 degrees of freedom, p = 0.001


def test_a_negative_shift_is_refused() -> None:
    with pytest.raises(ConfigError, match="shift"):
        Augment(shift=-1)
