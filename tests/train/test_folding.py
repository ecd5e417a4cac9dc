"""Folded copies answer as the networks do; one that does not never teaches."""

import copy

import pytest
import torch
from torch import nn

from kd.models import CifarResNet, PlainCNN, build_model
from kd.train import folding
from kd.train.folding import folded
from kd.train.targets import as_asked
from tests.learners import Guarded, network, pictures, recipe


def trained_looking(model: nn.Module) -> nn.Module:
    """Running statistics as after a training: folding the initial ones would change nothing."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight, 1.0, 0.2)
    return model.eval().requires_grad_(False)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("model", [PlainCNN(depth=8), CifarResNet(depth=8)], ids=str)
def test_a_folded_copy_has_no_batch_norm_left_and_answers_alike(model):
    original = trained_looking(build_model(model, channels=3, image_size=32, num_classes=10))
    images = torch.randn(16, 3, 32, 32)
    made = folded(original, images[:2])
    assert norms(made) == 0 < norms(original)
    torch.testing.assert_close(made(images), original(images), rtol=1e-4, atol=1e-4)


def test_folding_leaves_the_network_alone_and_the_copy_out_of_training_mode():
    original = trained_looking(network())
    before = copy.deepcopy(original.state_dict())
    made = folded(original, torch.randn(2, 1, 8, 8))
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert all(t.equal(before[name]) for name, t in original.state_dict().items())


def test_a_network_that_cannot_be_traced_is_asked_as_it_is():
    original = trained_looking(Guarded(network()))
    assert folded(original, torch.randn(2, 1, 8, 8)) is original


@pytest.mark.parametrize("by", [(1.0, 1.0, 1.0), (-1.0, -1.0, -1.0), (0.0, 0.0, 1.0)])
def test_a_copy_that_answers_otherwise_is_not_used(monkeypatch, by):
    def spoilt(model):
        made = copy.deepcopy(model)
        made[-1].bias.data += torch.tensor(by)
        return made

    original = trained_looking(network())
    monkeypatch.setattr(folding, "fuse", spoilt)
    assert folded(original, torch.randn(2, 1, 8, 8)) is original


def test_a_network_with_answers_of_not_a_number_is_asked_as_it_is():
    original = trained_looking(network())
    original[-1].bias.data[0] = torch.nan
    assert folded(original, torch.randn(2, 1, 8, 8)) is original


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_members_are_asked_in_the_memory_format_of_the_recipe(memory_format):
    made = as_asked(trained_looking(network()), pictures(), recipe(memory_format=memory_format))
    weights = next(
        module.weight for module in reversed(list(made.modules())) if isinstance(module, nn.Conv2d)
    )
    last = weights.is_contiguous(memory_format=torch.channels_last)
    assert last == (memory_format == "channels_last")
