"""Cached against on-line targets; what a table is keyed by."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch._prims_common import suggest_memory_format

from kd.component import ConfigError
from kd.data import Augment
from kd.ensemble import Ensemble
from kd.methods import SoftTargets, soft_loss
from kd.tables import TARGETS, DiskTables
from kd.train.plan import Batch, batch_of
from kd.train.targets import Cached, InMemory, Online, cache_pays, targets_of
from tests.learners import CLASSES, network, pictures, recipe

WEIGHTS = (0.3, 0.7)


def ensemble(first=0, weights=WEIGHTS):
    return Ensemble((network(first), network(first + 1)), weights)


def soft_targets(who, temperature):
    return SoftTargets(who.weights_K, (temperature,), who.mixing)


def cached(images=None, tables=None, who=None, temperature=4.0, **changes):
    images, who = images or pictures(), who or ensemble()
    settings = recipe(targets="cached", **changes)
    reduction = soft_targets(who, temperature)
    return targets_of(who, reduction, images, settings, CLASSES, tables)


def online(images=None, who=None, temperature=4.0):
    images, who = images or pictures(), who or ensemble()
    return targets_of(who, soft_targets(who, temperature), images, recipe(targets="online"), 3)


class Counted(DiskTables):
    """Tables on disk that count how often one is made."""

    def __init__(self):
        self.made = 0

    def table(self, record, shape, fill):
        def counted(table):
            self.made += 1
            fill(table)

        return super().table(record, shape, counted)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_targets_may_enter_a_loss_that_learns():
    images, student = pictures(), network(1)
    shown = batch_of(0, 8, len(images), images.augment, seed=0)
    for targets in (online(), cached()):
        batch = images.batch(shown.indices_B, shown.views_B)
        rows = targets.rows(batch, shown)
        soft_loss(student(batch), rows, 2.0).backward()
        assert not rows.requires_grad


def test_members_are_asked_in_the_precision_of_the_recipe_at_each_step_and_beforehand():
    """A table holds logits of 8 bits of mantissa exactly, and those of 24 to 11 bits."""
    images, who = pictures(), ensemble()
    shown = batch_of(0, 8, len(images), images.augment, seed=0)
    batch = images.batch(shown.indices_B, shown.views_B)
    reduction, settings = soft_targets(who, 1.0), recipe(targets="online", precision="bf16")
    asked = targets_of(who, reduction, images, settings, CLASSES).rows(batch, shown)
    looked_up = cached(images, who=who, temperature=1.0, precision="bf16").rows(batch, shown)
    torch.testing.assert_close(looked_up, asked, rtol=0, atol=1e-6)
    fine = online(images, who, temperature=1.0).rows(batch, shown)
    assert (asked - fine).abs().max() > 1e-4


@pytest.mark.parametrize("views", [None, 1, 4])
@pytest.mark.parametrize("large", [False, True])
def test_cached_targets_are_the_targets_of_the_very_view_shown(views, large, monkeypatch):
    if large:  # reduced at each step instead of beforehand
        monkeypatch.setattr("kd.train.targets.TABLE_BYTES", 0)
    images = pictures(augment=Augment(shift=1, flip=True))
    ours, asked = cached(images, views=views), online(images)
    assert (ours.rows_VNR is None) == large
    assert ours.views == views
    for step in range(30):
        shown = batch_of(step, 8, len(images), images.augment, seed=0, views=ours.views)
        batch = images.batch(shown.indices_B, shown.views_B)
        found, wanted = ours.rows(batch, shown), asked.rows(batch, shown)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)  # half precision


def test_members_asked_all_at_once_say_what_they_say_one_by_one():
    images, who = pictures(), ensemble()
    settings = recipe(targets="stacked")
    together = targets_of(who, soft_targets(who, 4.0), images, settings, CLASSES)
    shown = batch_of(0, 8, len(images), images.augment, seed=0)
    batch = images.batch(shown.indices_B, shown.views_B)
    found = together.rows(batch, shown)
    torch.testing.assert_close(found, online(images, who).rows(batch, shown))
    assert not found.requires_grad


class AsOnAGpu(nn.Module):
    """Asks for its input as a GPU's batch norm does: contiguous as its strides suggest."""

    def forward(self, images):
        return images.contiguous(memory_format=suggest_memory_format(images))


def test_members_asked_all_at_once_can_be_normalised_on_a_gpu():
    """vmap refuses to be asked for channels_last, which cuDNN does."""
    networks = [network(seed) for seed in (0, 1)]
    members = [nn.Sequential(*net[:4], AsOnAGpu(), *net[4:]) for net in networks]
    who, images = Ensemble(members, WEIGHTS), pictures()
    settings = recipe(targets="stacked", memory_format="channels_last")
    together = targets_of(who, soft_targets(who, 4.0), images, settings, CLASSES)
    shown = batch_of(0, 8, len(images), images.augment, seed=0)
    together.rows(images.batch(shown.indices_B, shown.views_B), shown)


def test_members_of_two_architectures_cannot_be_asked_all_at_once():
    who = Ensemble((network(0), network(1, dropout=0.5)), WEIGHTS)
    with pytest.raises(ConfigError, match=r"recipe\.targets is stacked"):
        targets_of(who, soft_targets(who, 4.0), pictures(), recipe(targets="stacked"), CLASSES)


def test_recurring_views_are_the_same_for_every_seed_and_fresh_ones_are_not():
    images = pictures(augment=Augment(shift=3))
    shown = {
        (seed, views): [
            batch_of(step, 40, 40, images.augment, seed=seed, views=views) for step in range(6)
        ]
        for seed in (0, 1)
        for views in (None, 2)
    }

    def views_of(shown: Batch) -> list[int]:
        return shown.views_B[shown.indices_B.argsort()].tolist()

    recurring = {seed: [views_of(each) for each in shown[seed, 2]] for seed in (0, 1)}
    assert recurring[0] == recurring[1]
    assert recurring[0][0] == recurring[0][2] != recurring[0][1]
    assert [each.passes_B.unique().tolist() for each in shown[0, 2]] == [[0], [1]] * 3
    fresh = [views_of(each) for each in shown[0, None] + shown[1, None]]
    assert len({tuple(each) for each in fresh}) == 12


def test_more_views_than_there_are_means_all_of_them():
    assert cached(views=99).views is None


def test_auto_caches_where_each_view_is_asked_for_less_than_once(monkeypatch):
    nine = pictures(augment=Augment(shift=1))
    assert cache_pays(nine, recipe(epochs=10), 10)
    assert not cache_pays(nine, recipe(epochs=9), 10)
    assert cache_pays(nine, recipe(epochs=9, views=8), 10)
    assert not cache_pays(nine, recipe(epochs=10, mixup=0.2), 10)
    monkeypatch.setattr("kd.train.targets.KEPT_BYTES", 2 * 9 * len(nine) * 10)
    assert cache_pays(nine, recipe(epochs=10), 10)
    assert not cache_pays(nine, recipe(epochs=10), 11)
    monkeypatch.undo()
    many = pictures(augment=Augment(shift=4))
    assert not cache_pays(many, recipe(epochs=16), 10)
    assert cache_pays(many, recipe(epochs=17), 10)
    members = ensemble()
    for epochs, kind in ((9, Online), (10, Cached)):
        settings = recipe(epochs=epochs)
        found = targets_of(members, soft_targets(members, 4.0), nine, settings, CLASSES)
        assert isinstance(found, kind)


def test_tables_are_shared_whatever_the_weights_and_the_temperature(here):
    tables = Counted()
    cached(tables=tables)
    assert tables.made == 2
    again = cached(tables=tables, who=ensemble(weights=(0.9, 0.1)), temperature=1.0)
    assert tables.made == 2
    images = pictures()
    shown = batch_of(0, 8, len(images), images.augment, seed=0)
    batch = images.batch(shown.indices_B, shown.views_B)
    wanted = online(who=ensemble(weights=(0.9, 0.1)), temperature=1.0).rows(batch, shown)
    torch.testing.assert_close(again.rows(batch, shown), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "made"),
    {
        "another member": ({"who": ensemble(1)}, 1),  # the other one of the two is known
        "other images": ({"images": pictures(num=41)}, 2),
        "other views": ({"images": pictures(augment=Augment(shift=2))}, 2),
        "fewer views": ({"views": 2}, 2),
        "another precision": ({"precision": "bf16"}, 2),
        "another memory format": ({"memory_format": "contiguous"}, 2),
        "another normalisation": ({"images": replace(pictures(), mean=(0.5,))}, 2),
    }.values(),
)
def test_a_table_of_anything_else_is_never_read(here, change, made):
    tables = Counted()
    cached(tables=tables)
    tables.made = 0
    cached(tables=tables, **change)
    assert tables.made == made


def test_a_member_that_changed_by_one_bit_is_asked_anew(here):
    tables, who = Counted(), ensemble()
    cached(tables=tables, who=who)
    who.members[0][1].running_mean[3] += 1e-6
    cached(tables=tables, who=who)
    assert tables.made == 3


@pytest.mark.parametrize("damage", ["flipped", "cut", "no record", "another record"])
def test_a_damaged_table_is_made_anew(here, damage):
    tables = Counted()
    cached(tables=tables)
    path = sorted(TARGETS.glob("*.npy"))[0]
    good, record = path.read_bytes(), path.with_suffix(".json")
    if damage == "flipped":
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(good[:-2])
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text().replace('"fp32"', '"bf16"'))
    cached(tables=tables)
    assert tables.made == 3
    assert path.read_bytes() == good


def test_two_trainings_at_once_make_one_table_of_each_member(here):
    tables, who = Counted(), ensemble()  # made here: threads share PyTorch's random numbers
    settings = {"tables": tables, "who": who}
    threads = [threading.Thread(target=cached, kwargs=settings) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tables.made == 2


def test_a_table_that_was_begun_and_not_ended_leaves_nothing(here):
    class Killed(InMemory, DiskTables):
        def table(self, record, shape, fill):
            def half(table):
                table[0] = 0
                raise KeyboardInterrupt

            return DiskTables.table(self, record, shape, half)

    with pytest.raises(KeyboardInterrupt):
        cached(tables=Killed())
    assert [path for path in TARGETS.iterdir() if path.suffix != ".lock"] == []


def test_tables_are_mapped_half_precision_that_anyone_can_read(here):
    cached(tables=DiskTables())
    paths = list(TARGETS.glob("*.npy"))
    assert paths
    for path in paths:
        table = np.load(path, mmap_mode="r")
        assert (table.dtype, table.shape) == (np.float16, (9, 40, CLASSES))


def test_logits_beyond_half_precision_are_refused_by_name():
    who = ensemble()
    with torch.no_grad():
        who.members[1][-1].bias[0] = 1e5
    with pytest.raises(ConfigError, match=r"recipe\.targets to online"):
        cached(who=who)
