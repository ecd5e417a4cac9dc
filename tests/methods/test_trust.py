"""How much each teacher is trusted, against the float64 oracles.

B batch, K members, C classes.
"""

import math

import numpy as np
import pytest
import torch

from kd.component import ConfigError
from kd.ensemble import Ensemble
from kd.methods import DKD, KD, MLKD, Members, SoftTargets, mix
from kd.methods.losses import log_probs, soft_losses
from kd.methods.mixing import combined, standardized
from kd.methods.taught import evened
from kd.methods.trust import Confidence, Correctness, Drop, Entropy, MinNorm, Unbiased
from kd.methods.trust.min_norm import min_norm
from kd.train import fit
from tests import reference
from tests.checks_methods import B, C, K, batch, loss_of, unlabelled
from tests.learners import CLASSES, network, pictures, recipe

UNIFORM = (1 / K,) * K
MEMBERS = Members(("0", "1", "2"), UNIFORM)


def weights_of(trust, labels_B=None):
    """The weights that each image gives its members, as the soft targets use them."""
    _, teachers, labels = batch(seed=2)
    labels = labels if labels_B is None else labels_B
    return combined(trust.factors(log_probs(teachers), labels), UNIFORM)


def by_image():
    """(every member's logits, label) of each image, as plain lists."""
    _, teachers, labels = batch(seed=2)
    return list(zip(teachers.transpose(0, 1).tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize(
    ("trust", "oracle"),
    [
        (Confidence(), reference.confidence_weights),
        (Correctness(), reference.correctness_weights),
        (Entropy(), lambda logits, label: reference.entropy_weights(logits)),
    ],
)
def test_weights_by_image_equal_the_oracle(trust, oracle):
    for ours, image in zip(weights_of(trust).tolist(), by_image(), strict=True):
        assert ours == pytest.approx(oracle(*image), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("trust", [Confidence(), Correctness()])
def test_unlabelled_images_trust_all_members_alike(trust):
    weights = weights_of(trust, unlabelled(batch()[2]))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / K))


def test_trust_multiplies_the_weights_of_the_ensemble():
    factors = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.0, 2.0]])
    found = combined(factors, (0.5, 0.5, 0.0))
    torch.testing.assert_close(found[0], torch.tensor([1 / 3, 2 / 3, 0.0]))
    torch.testing.assert_close(
        found[1], torch.tensor([0.5, 0.5, 0.0])
    )  # nobody is left: as before


@pytest.mark.parametrize(
    "trust", [Confidence(), Entropy(), Unbiased(biased="0"), Correctness(), MinNorm()]
)
def test_a_batch_may_be_taken_in_parts_where_trust_looks_at_each_image_alone(trust):
    logits, teachers, labels = batch(seed=2)
    method = KD(trust=trust)
    halves = [
        loss_of(method, logits[part], teachers[:, part], labels[part])
        for part in (slice(B // 2), slice(B // 2, B))
    ]
    whole = loss_of(method, logits, teachers, labels)
    assert method.by_image == torch.allclose(torch.stack(halves).mean(), whole, rtol=1e-6)


def test_the_loss_is_that_of_the_mixture_by_image():
    logits, teachers, labels = batch(seed=2)
    soft = mix(teachers, weights_of(Confidence()), 4.0).exp().tolist()
    each = [
        16 * reference.kl(s, reference.softmax(z, 4.0))
        for s, z in zip(soft, logits.tolist(), strict=True)
    ]
    ours = loss_of(KD(alpha=1.0, trust=Confidence()), logits, teachers, labels)
    assert float(ours) == pytest.approx(sum(each) / B, rel=1e-5)


def test_the_emphasis_of_unlabelled_images_is_their_disagreement():
    _, teachers, labels = batch(seed=2)
    rows = SoftTargets(UNIFORM, (4.0,), trust=Correctness())(teachers, unlabelled(labels))
    wanted = [reference.disagreement(logits) for logits, _ in by_image()]
    assert rows[:, -1].tolist() == pytest.approx(wanted, rel=1e-4)


def test_the_emphasis_of_labelled_images_is_the_correctness_of_the_mixture():
    _, teachers, labels = batch(seed=2)
    rows = SoftTargets(UNIFORM, (4.0,), trust=Correctness())(teachers, labels)
    for ours, (logits, label) in zip(rows[:, -1].tolist(), by_image(), strict=True):
        weights = reference.correctness_weights(logits, label)
        mixed = reference.mixture(logits, weights, 1.0)
        onehot = [float(c == label) for c in range(len(mixed))]
        assert ours == pytest.approx(1 / (1 + reference.cross_entropy(onehot, mixed)), rel=1e-5)


def test_emphasis_has_mean_1_over_the_labelled_and_over_the_unlabelled():
    """Else the soft loss would fade as teachers become sure, and one group drown the other."""
    labelled = torch.tensor([True, True, False, False, False])
    even = evened(torch.tensor([0.2, 0.6, 1e-3, 2e-3, 3e-3]), labelled)
    torch.testing.assert_close(even, torch.tensor([0.5, 1.5, 0.5, 1.0, 1.5]))
    torch.testing.assert_close(evened(torch.zeros(2), torch.tensor([False, False])), torch.ones(2))


@pytest.mark.parametrize("share", [0.0, 1.0, 2.5])
def test_unlabelled_images_count_as_much_as_was_asked_for(share):
    """Against the loss in plain loops; the labelled images' part does not move."""
    logits, teachers, labels = batch(seed=2)
    known = range(B // 4)
    labels[len(known) :] = -1
    emphasis, losses = [], []
    for image, (said, label) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
        members = teachers[:, image].tolist()
        weights = list(UNIFORM)
        if image in known:
            weights = reference.correctness_weights(members, label)
            correct = reference.mixture(members, weights, 1.0)[label]
            emphasis.append(1 / (1 - math.log(correct)))
        else:
            emphasis.append(reference.disagreement(members))
        soft = reference.mixture(members, weights, 4.0)
        losses.append(16 * reference.kl(soft, reference.softmax(said, 4.0)))
    wanted = 0.0
    for group, counts in ((known, 1.0), (range(len(known), B), share)):
        mean = sum(emphasis[image] for image in group) / len(group)
        wanted += sum(counts * emphasis[image] / mean * losses[image] for image in group) / B
    trust = Correctness(unlabelled=share)
    ours = loss_of(KD(alpha=1.0, trust=trust), logits, teachers, labels)
    assert float(ours) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("cap", [0.4, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_min_norm_equals_the_best_on_a_grid(seed, cap):
    vectors = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).double()
    vectors += torch.tensor([[1.0], [0.0], [-0.5]])
    ours = min_norm(vectors @ vectors.T, cap).tolist()
    slow = reference.shortest(vectors.tolist(), cap)
    assert sum(ours) == pytest.approx(1)
    assert max(ours) <= cap + 1e-9
    assert min(ours) >= 0
    length = lambda w: float((torch.tensor(w).double() @ vectors).norm())  # noqa: E731
    assert length(ours) <= length(slow) + 1e-9
    assert ours == pytest.approx(slow, abs=0.03)


def test_min_norm_is_defined_for_a_lone_member_and_for_equal_ones():
    assert min_norm(torch.tensor([[2.0]]).double(), 0.6).tolist() == [1.0]
    assert min_norm(torch.ones(2, 2).double(), 0.6).tolist() == [0.5, 0.5]
    assert min_norm(torch.zeros(2, 2).double(), 0.3).tolist() == [0.5, 0.5]


def test_min_norm_ends_at_the_optimum_however_unequal_the_members():
    """The problem is convex: best are those weights of which no pair gains by an exchange."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        members, dimensions = rng.integers(2, 11), rng.integers(1, 12)
        lengths = 10 ** rng.uniform(-2, 1, size=(members, 1))
        vectors = rng.normal(size=(members, dimensions)) * lengths
        vectors[-1] = vectors[rng.integers(members)]  # a twin, at times
        gram, cap = vectors @ vectors.T, max(rng.choice([0.05, 0.4, 0.6, 1.0]), 1 / members)
        weights = min_norm(torch.from_numpy(gram), cap).numpy()
        assert sum(weights) == pytest.approx(1, abs=1e-12)
        assert all(0 <= weight <= cap for weight in weights)
        slopes = gram @ weights
        takers = [slope for slope, weight in zip(slopes, weights, strict=True) if weight < cap]
        givers = [slope for slope, weight in zip(slopes, weights, strict=True) if weight > 0]
        assert not takers or max(givers) - min(takers) <= 1e-11 * gram.max()


def test_min_norm_asks_for_the_gradient_at_the_students_logits():
    logits, teachers, _ = batch(seed=2)
    gradients = logits.softmax(1) - teachers.softmax(2)
    weights = MinNorm(cap=1.0).factors(gradients, MEMBERS)
    wanted = reference.shortest(gradients.mean(1).tolist(), 1.0)
    assert weights[0].tolist() == pytest.approx(wanted, abs=0.02)
    assert (weights == weights[0]).all()


@pytest.mark.parametrize("standardize", [False, True])
def test_members_are_compared_by_plain_kds_gradients_under_every_method(standardize):
    """T (p_student - p_member) is the gradient of T^2 KL, at the method's first temperature."""
    logits, teachers, labels = batch(seed=2)
    compared = standardized if standardize else torch.clone
    seen = {}

    class Spy(MinNorm):
        def factors(self, gradients_KBC, members):
            seen["gradients"] = gradients_KBC
            return super().factors(gradients_KBC, members)

    for method, temperature in ((KD, 4.0), (DKD, 4.0), (MLKD, MLKD().temperatures[0])):
        loss_of(method(trust=Spy(), standardize=standardize), logits, teachers, labels)
        for each, member in zip(seen["gradients"], teachers, strict=True):
            leaf = compared(logits).requires_grad_()
            mixture = log_probs(compared(member), temperature)
            soft_losses(leaf, mixture, temperature).sum().backward()
            torch.testing.assert_close(temperature * each, leaf.grad, rtol=1e-5, atol=1e-6)


def test_unbiased_equals_the_oracle_and_silences_the_biased_member():
    logits, teachers, _ = batch(seed=2)
    gradients = logits.softmax(1) - teachers.softmax(2)
    factors = Unbiased(biased="1").factors(gradients, MEMBERS)
    for image, row in enumerate(factors.tolist()):
        of = gradients[:, image].tolist()
        wanted = [1 - reference.cosine(of[0], of[1]), 0.0, 1 - reference.cosine(of[2], of[1])]
        assert row == pytest.approx(wanted, abs=1e-6)


def test_the_biased_member_does_not_teach_where_all_others_have_its_direction():
    """There it says nothing for any of them, and they keep their own weights."""
    members = Members(("0", "1", "2"), (0.3, 0.6, 0.1))
    gradients = torch.randn(1, B, C, generator=torch.Generator().manual_seed(0)).double()
    factors = Unbiased(biased="1").factors(
        gradients * torch.tensor([[[2]], [[1]], [[3]]]), members
    )
    weights = combined(factors, members.weights_K)
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0, 0.25]]).double().expand(B, -1))


@pytest.mark.parametrize(
    ("biased", "weights", "said"),
    [
        ("large", (1.0, 0.0, 0.0), "biased is 'large'; it must be one of"),
        ("1", (0.0, 1.0, 0.0), "above 0 for a teacher other than the biased '1'"),
    ],
)
def test_nobody_is_taught_by_an_unknown_biased_member_or_by_it_alone(biased, weights, said):
    ensemble = Ensemble(tuple(network(k) for k in range(3)), weights)
    taught = {"method": KD(trust=Unbiased(biased=biased)), "ensemble": ensemble}
    with pytest.raises(ConfigError, match=said):
        fit(network(), pictures(), recipe(), seed=0, num_classes=CLASSES, **taught)


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_dropped_members_sit_out_a_whole_batch_and_never_all_of_them(keep):
    torch.manual_seed(0)
    seen = torch.stack(
        [Drop(keep=keep).factors(torch.zeros(3, 4, 5), MEMBERS) for _ in range(200)]
    )
    assert (seen == seen[:, :1]).all()
    assert ((seen[:, 0] > 0).sum(1) >= 1).all()
    expected = keep + (1 - keep) ** 3  # an empty draw keeps all
    assert seen.mean() == pytest.approx(expected, abs=0.06)
