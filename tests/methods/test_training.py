"""Every method in the training loop: it resumes to the same bits and leaves its teachers alone."""

import pytest
import torch

from kd.ensemble import Ensemble
from kd.methods import Labels
from kd.train import fit
from tests.learners import CLASSES, network, pictures, recipe
from tests.methods.test_methods import METHODS
from tests.train.test_loop import Memory, weights_of

TAUGHT = {name: method for name, method in METHODS.items() if method.needs == "teachers"}


def taught(method, seed=0, checkpoint=None, **changes):
    """A small student under two teachers, from labelled and unlabelled images."""
    ensemble = Ensemble((network(5), network(6)), (0.3, 0.7))
    before = ensemble.fingerprint()
    model, history = fit(
        network(seed),
        pictures(labelled=20),
        recipe(epochs=2, checkpoint_steps=4, clip_norm=5.0, **changes),
        seed=0,
        num_classes=CLASSES,
        method=method,
        ensemble=ensemble,
        checkpoint=checkpoint,
    )
    assert ensemble.fingerprint() == before
    assert all(p.grad is None for member in ensemble.members for p in member.parameters())
    return model, history


@pytest.mark.parametrize("name", TAUGHT)
def test_a_stopped_run_resumes_to_the_same_bits(name):
    whole, _ = taught(TAUGHT[name])
    memory = Memory(stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        taught(TAUGHT[name], checkpoint=memory)
    memory.stop_after = None
    resumed, _ = taught(TAUGHT[name], seed=9, checkpoint=memory)
    assert weights_of(resumed) == weights_of(whole)


@pytest.mark.parametrize("name", ["kd_correctness", "kd_min_norm", "mlkd"])
def test_cached_and_online_targets_train_alike(name):
    cached, _ = taught(TAUGHT[name], targets="cached")
    online, _ = taught(TAUGHT[name], targets="online")
    for a, b in zip(cached.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_without_teachers_a_method_that_needs_them_is_labels_alone():
    def alone(method):
        images = pictures()
        return fit(network(), images, recipe(), seed=0, num_classes=CLASSES, method=method)[0]

    assert weights_of(alone(METHODS["dkd"])) == weights_of(alone(Labels()))
