"""Every method against its float64 oracle, and against the battery, alone and with each option."""

import pytest
import torch

from kd.component import ConfigError
from kd.methods import (
    DIST,
    DKD,
    KD,
    MLKD,
    AnnealedKD,
    ContinuationKD,
    Labels,
    Shown,
    VirtualTeacher,
    hard_loss,
    label_probs,
    mix,
    soft_loss,
)
from kd.methods.mixing import standardized
from kd.methods.trust import Confidence, Correctness, Drop, Entropy, MinNorm, Unbiased
from tests import reference
from tests.checks_methods import CHECKS, B, C, K, batch, gradient_of, loss_of, unlabelled

TRUSTS = [Correctness(), Confidence(), Entropy(), MinNorm(), Unbiased(biased="0"), Drop()]
METHODS = {
    "kd": KD(),
    "dkd": DKD(),
    "dist": DIST(),
    "mlkd": MLKD(),
    "annealed": AnnealedKD(),
    "continuation": ContinuationKD(),
    "labels": Labels(),
    "smoothed": Labels(smoothing=0.1),
    "virtual_teacher": VirtualTeacher(),
    "patient": KD(temperature=1.0, alpha=1.0),
    **{f"standardized_{m.kind}": type(m)(standardize=True) for m in (KD(), DKD(), DIST(), MLKD())},
    **{f"kd_{trust.kind}": KD(trust=trust) for trust in TRUSTS},
    **{f"dkd_{trust.kind}": DKD(trust=trust, standardize=True) for trust in TRUSTS},
    **{f"dist_{trust.kind}": DIST(trust=trust) for trust in TRUSTS},
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", METHODS)
def test_every_method_passes_the_battery(name, check):
    check(METHODS[name])


@pytest.mark.parametrize("name", [name for name in METHODS if not name.endswith("_drop")])
def test_a_batch_may_be_taken_in_parts_wherever_their_mean_loss_is_the_batchs(name):
    method, (logits, teachers, labels) = METHODS[name], batch(seed=2)
    halves = [
        loss_of(method, logits[part], teachers[:, part], labels[part])
        for part in (slice(B // 2), slice(B // 2, B))
    ]
    whole = loss_of(method, logits, teachers, labels)
    assert method.by_image == torch.allclose(torch.stack(halves).mean(), whole, rtol=1e-6)


def mixture(teachers, temperature, standardize=False):
    """The oracle's soft targets of each image under equal weights."""
    rows = [
        [reference.standardized(z) if standardize else z for z in member] for member in teachers
    ]
    weights = [1 / len(rows)] * len(rows)
    images = range(len(rows[0]))
    return [reference.mixture([m[i] for m in rows], weights, temperature) for i in images]


def test_standardized_logits_have_mean_0_and_deviation_1():
    _, teachers, _ = batch(seed=3)
    for ours, member in zip(standardized(teachers).tolist(), teachers.tolist(), strict=True):
        for row, logits in zip(ours, member, strict=True):
            assert row == pytest.approx(reference.standardized(logits))


def test_logits_in_half_precision_are_standardized_and_mixed_in_single():
    teachers = batch(seed=3)[1].bfloat16()
    torch.testing.assert_close(standardized(teachers), standardized(teachers.float()))
    mixed, wanted = (mix(z, (1 / K,) * K, 4.0, "logits") for z in (teachers, teachers.float()))
    torch.testing.assert_close(mixed, wanted)


def plain():
    logits, teachers, labels = batch(seed=3)
    return logits.tolist(), teachers.tolist(), labels.tolist()


def cross_entropy(logits, labels):
    each = [-torch.log_softmax(torch.tensor(z), 0)[y] for z, y in zip(logits, labels, strict=True)]
    return float(sum(each)) / len(each)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_kd_equals_the_oracle(temperature, alpha, standardize):
    logits, teachers, labels = plain()
    soft = mixture(teachers, temperature, standardize)
    compared = [reference.standardized(z) for z in logits] if standardize else logits
    wanted = sum(
        temperature**2 * reference.kl(s, reference.softmax(z, temperature))
        for s, z in zip(soft, compared, strict=True)
    )
    wanted = alpha * wanted / B + (1 - alpha) * cross_entropy(logits, labels)
    method = KD(temperature=temperature, alpha=alpha, standardize=standardize)
    assert float(loss_of(method, *batch(seed=3))) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("progress", [0.02, 0.5])
def test_dkd_equals_the_oracle_and_warms_up(progress):
    logits, teachers, labels = plain()
    soft = mixture(teachers, 3.0)
    each = [
        reference.dkd_image(*image, 3.0, 0.7, 5.0)
        for image in zip(logits, soft, labels, strict=True)
    ]
    wanted = cross_entropy(logits, labels) + min(progress / 0.1, 1) * sum(each) / B
    method = DKD(temperature=3.0, target=0.7, others=5.0, warmup=0.1)
    ours = loss_of(method, *batch(seed=3), progress=progress)
    assert float(ours) == pytest.approx(wanted, rel=1e-5)


def test_dkd_takes_the_teachers_first_choice_for_the_label_of_an_unlabelled_image():
    logits, teachers, labels = batch(seed=3)
    guesses = mix(teachers, (1 / K,) * K, 4.0).argmax(1)
    without = loss_of(DKD(alpha=1.0), logits, teachers, unlabelled(labels))
    torch.testing.assert_close(without, loss_of(DKD(alpha=1.0), logits, teachers, guesses))


def test_dkd_with_the_teachers_own_weights_is_kd():
    """Equation 6: KD is the target's divergence plus (1 - p_label) times the others'."""
    logits, teachers, labels = batch(size=1, members=1)
    label_prob = float(mix(teachers, (1.0,), 4.0).exp()[0, labels[0]])
    decoupled = DKD(alpha=1.0, scale=1.0, others=1 - label_prob, warmup=0.0)
    whole = loss_of(KD(alpha=1.0), logits, teachers, labels)
    torch.testing.assert_close(loss_of(decoupled, logits, teachers, labels), whole)


def test_dist_equals_the_oracle():
    logits, teachers, labels = plain()
    soft = reference.dist_soft(logits, mixture(teachers, 2.0), 2.0, 1.5, 0.5)
    method = DIST(temperature=2.0, inter=1.5, intra=0.5)
    wanted = cross_entropy(logits, labels) + soft
    assert float(loss_of(method, *batch(seed=3))) == pytest.approx(wanted, rel=1e-5)


def test_mlkd_equals_the_oracle_at_every_temperature():
    logits, teachers, labels = plain()
    levels = (2.0, 5.0)
    soft = [reference.mlkd_soft(logits, mixture(teachers, t), t, 7.0, 11.0) for t in levels]
    method = MLKD(temperatures=levels, alpha=0.6, images=7.0, classes=11.0)
    wanted = 0.6 * sum(soft) / 2 + 0.4 * cross_entropy(logits, labels)
    assert float(loss_of(method, *batch(seed=3))) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 0.1), (0.31, 0.5), (0.74, 1.0)])
def test_annealed_kd_equals_the_oracle_while_it_anneals(progress, factor):
    logits, teachers, _ = plain()
    soft = mixture(teachers, 1.0)
    logs = [[factor * torch.tensor(p).double().log().item() for p in row] for row in soft]
    wanted = sum(map(reference.centred_distance, logits, logs)) / B
    ours = loss_of(AnnealedKD(), *batch(seed=3), progress=progress)
    assert float(ours) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("progress", [0.75, 0.8])
def test_annealed_kd_ends_with_labels_alone(progress):
    ours = loss_of(AnnealedKD(), *batch(), progress=progress)
    torch.testing.assert_close(ours, loss_of(Labels(), *batch()))


def test_continuation_kd_equals_the_oracle():
    logits, teachers, labels = plain()
    factor, psi, margin = 9 / 20, 0.31 / 0.75, 0.9
    soft = mixture(teachers, 1.0)
    logs = [[factor * torch.tensor(p).double().log().item() for p in row] for row in soft]
    distances = map(reference.centred_distance, logits, logs)
    hinged = sum(max(0.0, each - margin * factor) for each in distances) / B
    wanted = (1 - psi) * hinged + psi * cross_entropy(logits, labels)
    ours = loss_of(ContinuationKD(margin=margin), *batch(seed=3), progress=0.31)
    assert float(ours) == pytest.approx(wanted, rel=1e-5)


def test_the_virtual_teacher_equals_the_oracle():
    logits, _, labels = plain()
    method = VirtualTeacher(temperature=5.0, alpha=0.3, correct=0.9)
    pairs = zip(logits, labels, strict=True)
    wanted = sum(reference.virtual_teacher_image(*p, 5.0, 0.3, 0.9) for p in pairs) / B
    assert float(loss_of(method, *batch(seed=3))) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("method", [VirtualTeacher(), Labels()], ids=lambda method: method.kind)
def test_images_without_labels_weaken_no_loss_that_comes_from_labels(method):
    logits, _, labels = batch(seed=3)
    half = label_probs(torch.where(torch.arange(B) < B // 2, labels, -1), C)
    ours = method.loss(Shown(logits, half, labelled=0.5))
    torch.testing.assert_close(ours, method.loss(Shown(logits[: B // 2], half[: B // 2])))


def test_label_smoothing_equals_the_oracle():
    logits, _, labels = plain()
    rows = [reference.label_row(label, C, 0.2) for label in labels]
    probs = [reference.softmax(z) for z in logits]
    wanted = sum(map(reference.cross_entropy, rows, probs)) / B
    assert float(loss_of(Labels(smoothing=0.2), *batch(seed=3))) == pytest.approx(wanted, rel=1e-5)


def test_alpha_0_is_the_hard_loss_and_alpha_1_the_soft_loss():
    logits, teachers, labels = batch()
    hard = hard_loss(logits, label_probs(labels, C))
    torch.testing.assert_close(loss_of(KD(alpha=0.0), logits, teachers, labels), hard)
    soft = soft_loss(logits, mix(teachers, (1 / K,) * K, 4.0), 4.0)
    torch.testing.assert_close(loss_of(KD(alpha=1.0), logits, teachers, labels), soft)


def test_scale_multiplies_the_whole_gradient():
    doubled = gradient_of(KD(scale=2.0), *batch())
    torch.testing.assert_close(doubled, 2 * gradient_of(KD(), *batch()))


def test_weighing_losses_is_weighing_probabilities_and_not_logits():
    """A weighted sum of losses has the gradient of the loss to the weighted mixture."""
    logits, teachers, labels = batch()
    weights = (0.5, 0.3, 0.2)
    mixed = gradient_of(KD(alpha=1.0), logits, teachers, labels, weights=weights)
    apart = [gradient_of(KD(alpha=1.0), logits, each[None], labels) for each in teachers]
    summed = sum(w * g for w, g in zip(weights, apart, strict=True))
    torch.testing.assert_close(mixed, summed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        (KD, "temperature", 0.0),
        (KD, "temperature", -1.0),
        (KD, "alpha", 1.1),
        (KD, "scale", 0.0),
        (DKD, "others", -1.0),
        (DKD, "warmup", 1.0),
        (DIST, "inter", -1.0),
        (MLKD, "temperatures", ()),
        (MLKD, "temperatures", (1.0, 0.0)),
        (AnnealedKD, "levels", 0),
        (AnnealedKD, "regression", 0.0),
        (AnnealedKD, "regression", 1.01),
        (ContinuationKD, "levels", 0),
        (ContinuationKD, "handover", 0.0),
        (ContinuationKD, "handover", 1.01),
        (ContinuationKD, "margin", -0.01),
        (Labels, "smoothing", 1.0),
        (VirtualTeacher, "temperature", 0.0),
        (VirtualTeacher, "alpha", 1.01),
        (VirtualTeacher, "alpha", -0.01),
        (VirtualTeacher, "correct", 0.0),
        (VirtualTeacher, "correct", 1.0),
        (MinNorm, "cap", 0.0),
        (Drop, "keep", 0.0),
        (Correctness, "unlabelled", -1.0),
    ],
)
def test_values_out_of_range_are_refused(method, field, value):
    with pytest.raises(ConfigError, match=field):
        method(**{field: value})


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        (KD, "alpha", 0.0),
        (KD, "alpha", 1.0),
        (DKD, "warmup", 0.0),
        (AnnealedKD, "levels", 1),
        (AnnealedKD, "regression", 1.0),
        (ContinuationKD, "levels", 1),
        (ContinuationKD, "handover", 1.0),
        (ContinuationKD, "margin", 0.0),
        (Labels, "smoothing", 0.0),
        (VirtualTeacher, "alpha", 0.0),
        (VirtualTeacher, "alpha", 1.0),
    ],
)
def test_values_at_the_edge_are_taken(method, field, value):
    assert getattr(method(**{field: value}), field) == value
