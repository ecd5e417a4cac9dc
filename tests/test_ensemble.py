import pytest
import torch
import torch.nn.functional as F

from kd.component import ConfigError
from kd.ensemble import Ensemble, digest_of_tensors
from kd.methods import SoftTargets, mix
from tests import reference
from tests.learners import network, pictures


def logits(members=3, images=5, classes=4):
    return 4 * torch.randn(members, images, classes, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (1.0, 0.0, 0.0), (0.0, 0.6, 0.4)])
def test_mixing_probabilities_equals_the_oracle(temperature, weights):
    logits_KNC = logits()
    mixed = mix(logits_KNC, weights, temperature).exp()
    for image, row in enumerate(mixed):
        slow = reference.mixture(logits_KNC[:, image].tolist(), list(weights), temperature)
        assert row.tolist() == pytest.approx(slow, rel=1e-5, abs=1e-7)


def test_mixing_logits_is_another_estimator():
    logits_KNC, weights = logits(), (0.2, 0.5, 0.3)
    mean = sum(w * z for w, z in zip(weights, logits_KNC, strict=True))
    mixed = mix(logits_KNC, weights, 2.0, "logits")
    torch.testing.assert_close(mixed, F.log_softmax(mean / 2.0, -1))
    assert not torch.allclose(mixed, mix(logits_KNC, weights, 2.0), atol=1e-2)


def test_an_ensemble_of_one_is_the_lone_teacher():
    teacher, images = network(), pictures()
    batch = images.batch(torch.arange(8))
    ensemble = Ensemble((teacher,), (1.0,))
    rows = SoftTargets((1.0,), (4.0,))(ensemble.logits(batch), images.labels_N[:8])
    torch.testing.assert_close(rows, F.log_softmax(teacher(batch) / 4.0, 1))


def test_extreme_logits_mix_to_finite_probabilities():
    logits_KNC = torch.tensor([[[1e3, -1e3]], [[-1e3, 1e3]]])
    assert mix(logits_KNC, (0.5, 0.5), 1.0).tolist() == [[pytest.approx(-0.6931, abs=1e-3)] * 2]
    assert mix(logits_KNC, (1.0, 0.0), 1.0).isfinite().all()


def test_members_are_frozen_and_their_batch_statistics_stand_still():
    member = network().train()
    ensemble = Ensemble((member,), (1.0,))
    before = ensemble.fingerprint()
    for _ in range(3):
        ensemble.logits(pictures().batch(torch.arange(8)))
    assert ensemble.fingerprint() == before
    assert not member.training
    assert not any(parameter.requires_grad for parameter in member.parameters())


def test_the_fingerprint_sees_one_changed_statistic():
    member = network()
    ensemble = Ensemble((member,), (1.0,))
    before = ensemble.fingerprint()
    member[1].running_mean[3] += 1e-6
    assert ensemble.fingerprint() != before


@pytest.mark.parametrize("weights", [(0.5, 0.6), (-0.5, 1.5), (1.0,), (float("nan"), 1.0)])
def test_weights_off_the_simplex_are_refused(weights):
    with pytest.raises(ConfigError, match="weights_K"):
        Ensemble((network(0), network(1)), weights)


def test_weights_may_be_off_by_what_single_precision_rounds():
    weights = tuple(torch.tensor([0.1, 0.7, 0.2]).tolist())
    assert 0 < abs(sum(weights) - 1) < 1e-6
    assert Ensemble(tuple(map(network, range(3))), weights).names == ("0", "1", "2")


def test_names_are_one_for_each_member():
    with pytest.raises(ConfigError, match=r"^names is \('a',\); "):
        Ensemble((network(0), network(1)), (0.5, 0.5), names=("a",))


def test_the_digest_depends_on_names_and_values_but_not_on_their_order():
    a, b = torch.arange(3.0), torch.zeros(())
    assert digest_of_tensors({"a": a, "b": b}) == digest_of_tensors({"b": b, "a": a})
    assert digest_of_tensors({"a": a}) != digest_of_tensors({"b": a})
    assert digest_of_tensors({"a": a}) != digest_of_tensors({"a": a + 1})
