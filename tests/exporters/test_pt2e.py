"""A network that trains with int8 simulated stays the network that it was made from."""

import pytest
import torch
import torch.nn.functional as F

from kd.exporters.pt2e import simulated, with_weights_of
from kd.models import CifarResNet, PlainCNN, build_model

IMAGES_NCHW = torch.randn(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_simulated_network_learns_and_gives_its_weights_back() -> None:
    torch.manual_seed(0)
    module = build_model(PlainCNN(depth=2, width=0.5), channels=1, image_size=16, num_classes=4)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    learner = simulated(module, (1, 16, 16)).to(memory_format=torch.channels_last)
    labels_N = torch.arange(32) % 4
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(12):  # as fit() does: channels_last batches, in training mode
        learner.train()
        images = IMAGES_NCHW.to(memory_format=torch.channels_last)
        loss = F.cross_entropy(learner(images), labels_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    learned = with_weights_of(learner, module)
    assert not learned.training
    assert type(learned) is type(module)
    moved = {n for n, value in learned.state_dict().items() if not torch.equal(value, before[n])}
    assert moved == set(before)
    learner.eval()
    with torch.inference_mode():
        exact_NC, rounded_NC = learned(IMAGES_NCHW), learner(IMAGES_NCHW)
    assert not torch.equal(exact_NC, rounded_NC)


@pytest.mark.slow
def test_every_parameter_of_a_residual_network_is_found_again() -> None:
    module = build_model(CifarResNet(depth=8), channels=1, image_size=16, num_classes=4)
    learner = simulated(module, (1, 16, 16))
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.fill_(0.5)
    learned = with_weights_of(learner, module)
    assert all((parameter == 0.5).all() for parameter in learned.parameters())
