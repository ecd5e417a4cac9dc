"""Networks that learn together: each by its own loss alone, resumed to the same bits.

M networks (the student first), B batch, C classes, D features.
"""

import math

import pytest
import torch
from torch import nn

from kd.component import ConfigError
from kd.ensemble import Ensemble
from kd.evaluate import predict
from kd.methods import (
    AFD,
    BOC,
    DML,
    FFL,
    Codistillation,
    Gated,
    Members,
    OKDDip,
    OwnMean,
    ProKD,
    ProKT,
    Shown,
    label_probs,
)
from kd.methods.learner import Frozen, Learner, last_linear, with_features
from kd.train import fit
from tests import reference
from tests.learners import CLASSES, network, pictures, recipe
from tests.methods.test_training import Memory, weights_of

M, B, C, D = 3, 6, 5, 4
PEERS = {
    "prokt": ProKT(),
    "prokd": ProKD(),
    "dml": DML(),
    "codistillation": Codistillation(every=3, burn_in=0.0),
    "okddip": OKDDip(),
    "ffl": FFL(),
    "afd": AFD(),
    "boc": BOC(),
}
ALL = {**PEERS, "own_mean": OwnMean(decay=0.9)}


def num_networks(method):
    return 1 + min(method.num_peers.stop - 1, M - 1)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


def shown(logits_MBC, progress=0.6, **also):
    """A batch whose last image is unlabelled."""
    labels = torch.tensor([0, 1, 2, 3, 4, -1])
    extra = {"logits_MBC": logits_MBC, **also}
    return Shown(logits_MBC[0], label_probs(labels, C), None, None, progress, also=extra)


LABELS = [[float(c == label) for c in range(C)] for label in range(5)] + [[0.0] * C]


def hard(rows):
    return sum(map(reference.cross_entropy, LABELS, map(reference.softmax, rows))) / B


def soft(own, targets, temperature):
    """T^2 KL, mean over images, of rows of logits to rows of probabilities."""
    probs = [reference.softmax(row, temperature) for row in own]
    return temperature**2 * sum(map(reference.kl, targets, probs)) / B


def softened(rows, temperature):
    return [reference.softmax(row, temperature) for row in rows]


def mean(tables):
    """Of several tables, entry by entry."""
    return [
        [sum(entries) / len(tables) for entries in zip(*rows, strict=True)]
        for rows in zip(*tables, strict=True)
    ]


RISE = math.exp(-5 * (1 - 0.1 / 0.27) ** 2)


def own_dml(k, z, also):
    others = [soft(z[k], softened(z[j], 1.0), 1.0) for j in range(M) if j != k]
    return hard(z[k]) + sum(others) / (M - 1)


def own_codistillation(k, z, also):
    stale = also["stale_MBC"].tolist()
    average = mean([softened(stale[j], 1.0) for j in range(M) if j != k])
    return hard(z[k]) + soft(z[k], average, 1.0)


def test_own_mean_equals_the_oracle():
    logits, mean_BC = random(B, C), random(B, C, seed=1)
    method = OwnMean(temperature=2.0, weight=0.7, rise=0.27)
    given = shown(logits[None], progress=0.1, mean_BC=mean_BC)
    wanted = hard(logits.tolist()) + 0.7 * RISE * soft(
        logits.tolist(), softened(mean_BC.tolist(), 2.0), 2.0
    )
    assert float(method.loss(given)) == pytest.approx(wanted, rel=1e-5)


def own_prokt(k, z, also):
    if k == 0:
        return 0.9 * soft(z[0], softened(z[1], 4.0), 4.0) + 0.1 * hard(z[0])
    return hard(z[1]) + 0.1 * soft(z[1], softened(z[0], 4.0), 4.0)


def own_prokd(k, z, also):
    if k == 1:
        return hard(z[1])
    factor = (math.floor(0.1 / 0.75 * 10) + 1) / 10
    targets = [[factor * math.log(p) for p in reference.softmax(row)] for row in z[1]]
    return sum(map(reference.centred_distance, z[0], targets)) / B


def attended(k, z, also):
    """What peer k's attention makes of the peers' logits, softened."""
    attention = also["attention_BPP"].tolist()
    return [
        reference.softmax(
            [sum(attention[b][k - 1][q] * z[1 + q][b][c] for q in range(M - 1)) for c in range(C)],
            3.0,
        )
        for b in range(B)
    ]


def own_okddip(k, z, also):
    if k == 0:
        return hard(z[0]) + RISE * soft(z[0], softened(mean(z[1:]), 3.0), 3.0)
    return hard(z[k]) + RISE * soft(z[k], attended(k, z, also), 3.0)


def own_ffl(k, z, also):
    return hard(z[k]) + RISE * soft(z[k], softened(also["fused_BC"].tolist(), 3.0), 3.0)


def own_afd(k, z, also):
    return hard(z[k]) + soft(z[k], softened(z[k - 1], 3.0), 3.0)


def own_boc(k, z, also):
    return 0.7 * hard(z[k]) + 0.15 * soft(z[k], softened(mean(z), 2.0), 2.0)


OWN = {name.removeprefix("own_"): f for name, f in globals().items() if name.startswith("own_")}


def also_of(method):
    """What the method's learner would say beside the logits, made up."""
    return {
        "stale_MBC": random(M, B, C, seed=1),
        "attention_BPP": random(B, M - 1, M - 1, seed=2).softmax(2),
        "fused_BC": random(B, C, seed=3),
        "own_MB": random(M, B, seed=4),
        "neighbour_MB": random(M, B, seed=5),
        "fooled_MB": random(M, B, seed=6),
        "teacher_BD": random(B, D, seed=7),
        "adapted_PBD": random(M - 1, B, D, seed=8),
    }


def beside(name, method, z, also):
    """Oracles of what the losses hold beside each network's own."""
    if name == "ffl":
        fused = also["fused_BC"].tolist()
        return hard(fused) + RISE * soft(fused, softened(mean(z), 3.0), 3.0)
    if name == "afd":
        value = sum((1 - x) ** 2 for x in also["neighbour_MB"].flatten().tolist())
        value += sum(x**2 for x in also["own_MB"].flatten().tolist())
        value += sum((1 - x) ** 2 for x in also["fooled_MB"].flatten().tolist())
        return 0.1 * value / B
    if name == "boc":
        squares = (also["adapted_PBD"] - also["teacher_BD"]) ** 2
        return 0.15 * sum(sum(table.flatten().tolist()) / (B * D) for table in squares)
    return 0.0


@pytest.mark.parametrize("name", PEERS)
def test_the_loss_is_the_sum_of_everybodys_own(name):
    method = PEERS[name]
    logits = random(num_networks(method), B, C)
    also = also_of(method)
    z = logits.tolist()
    wanted = sum(OWN[name](k, z, also) for k in range(len(z))) + beside(name, method, z, also)
    ours = method.loss(shown(logits, progress=0.1, **also))
    assert float(ours) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", PEERS)
def test_no_gradient_leaks_between_peers(name):
    """Each network's gradient of the whole sum is that of its own loss, the others held fast."""
    method = PEERS[name]
    logits = random(num_networks(method), B, C).requires_grad_()
    also = also_of(method)
    method.loss(shown(logits, progress=0.1, **also)).backward()
    z = logits.detach().tolist()
    for k in range(len(z)):
        for b, c in ((0, 0), (2, 4), (5, 1)):
            values = []
            for nudge in (1e-5, -1e-5):
                nudged = [[list(row) for row in table] for table in z]
                nudged[k][b][c] += nudge
                values.append(own_with_held(name, k, nudged, z, also))
            slope = (values[0] - values[1]) / 2e-5
            assert float(logits.grad[k, b, c]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def own_with_held(name, k, nudged, z, also):
    """Network k's own loss; a target that averages k itself is held fast as well."""
    if name == "boc":
        return 0.7 * hard(nudged[k]) + 0.15 * soft(nudged[k], softened(mean(z), 2.0), 2.0)
    if name == "okddip" and k > 0:
        return hard(nudged[k]) + RISE * soft(nudged[k], attended(k, z, also), 3.0)
    return OWN[name](k, nudged, also)


def test_targets_carry_gradients_only_where_the_option_says_so():
    logits = random(M, B, C).requires_grad_()
    also = also_of(OKDDip())
    gradients = []
    for detach in (True, False):
        loss = OKDDip(detach=detach).loss(shown(logits, **also))
        gradients.append(torch.autograd.grad(loss, logits)[0])
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert not torch.allclose(gradients[0][1:], gradients[1][1:])


def test_attention_learns_though_its_targets_are_held_fast():
    learner = OKDDip().learner(network(0), [network(1), network(2)])
    logits_BC, also = learner.train()(pictures().batch(torch.arange(8)))
    labels = label_probs(torch.arange(8) % CLASSES, CLASSES)
    OKDDip().loss(Shown(logits_BC, labels, None, None, 0.9, also=also)).backward()
    assert all(q.weight.grad.abs().sum() > 0 for q in learner.queries)


@pytest.mark.parametrize("detach", [True, False])
def test_attention_reaches_features_only_where_the_option_says_so(detach):
    learner = OKDDip(detach=detach).learner(network(0), [network(1), network(2)]).train()
    _, also = learner(pictures().batch(torch.arange(8)))
    weight = learner.peers[0][0].weight
    (found,) = torch.autograd.grad(also["attention_BPP"][0, 0, 0], weight, allow_unused=True)
    assert (found is None) is detach


def test_attention_sums_to_1_in_half_precision_too():
    learner = OKDDip().learner(network(0), [network(1), network(2), network(3)]).train()
    with torch.autocast("cpu", torch.bfloat16):
        _, also = learner(pictures().batch(torch.arange(8)))
    sums = also["attention_BPP"].sum(dim=2)
    torch.testing.assert_close(sums, torch.ones(8, 3), rtol=0, atol=1e-6)


def test_features_are_compared_in_single_precision_in_half_precision_too():
    learner = BOC().learner(network(0), [network(1), network(2)]).train()
    with torch.autocast("cpu", torch.bfloat16):
        _, also = learner(pictures().batch(torch.arange(8)))
    assert (also["adapted_PBD"] - also["teacher_BD"]).dtype == torch.float32


def test_critics_and_networks_learn_apart():
    """Adversaries: the critics' loss moves no network, the networks' moves no critic."""
    learner = AFD().learner(network(0), [network(1)]).train()
    _, also = learner(pictures().batch(torch.arange(8)))
    critics = list(learner.critics.parameters())
    networks = [p for n in learner.networks for p in list(n.parameters())[:1]]

    def moved(value, parameters):
        found = torch.autograd.grad(value.sum(), parameters, retain_graph=True, allow_unused=True)
        return [gradient is not None and bool(gradient.abs().sum() > 0) for gradient in found]

    judged = also["own_MB"].square() + also["neighbour_MB"].square()
    assert any(moved(judged, critics))
    assert not any(moved(judged, networks))
    assert all(moved(also["fooled_MB"], networks))
    assert not any(moved(also["fooled_MB"], critics))


def learner_of(method, seed=0):
    peers = [network(seed + 1 + k) for k in range(num_networks(method) - 1)]
    return method.learner(network(seed), peers if method.needs == "peers" else [])


def together(method, seed=0, checkpoint=None, **changes):
    settings = {"epochs": 2, "checkpoint_steps": 4, **changes}
    return fit(
        learner_of(method, seed),
        pictures(labelled=20),
        recipe(**settings),
        seed=0,
        num_classes=CLASSES,
        method=method,
        checkpoint=checkpoint,
    )[0]


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"precision": "bf16"}], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_stopped_cohort_resumes_to_the_same_bits(name, changes):
    whole = together(ALL[name], **changes)
    memory = Memory(stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        together(ALL[name], checkpoint=memory, **changes)
    memory.stop_after = None
    resumed = together(ALL[name], seed=9, checkpoint=memory, **changes)
    assert weights_of(resumed) == weights_of(whole)


@pytest.mark.parametrize("name", ALL)
def test_in_evaluation_mode_a_learner_is_its_student(name):
    learner = together(ALL[name])
    assert isinstance(learner, Learner)
    assert not any(module.training for module in learner.modules())
    images = pictures()
    torch.testing.assert_close(predict(learner, images), predict(learner.student, images))


@pytest.mark.parametrize("name", ALL)
def test_everybody_learns(name):
    before = learner_of(ALL[name])
    learner = together(ALL[name])
    for old, new in zip(before.student.parameters(), learner.student.parameters(), strict=True):
        assert not torch.equal(old, new.contiguous())
    for name_, parameter in learner.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(dict(before.named_parameters())[name_], parameter), name_


@pytest.mark.parametrize("name", ALL)
def test_extreme_logits_stay_finite(name):
    method = ALL[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.zeros(num_networks(method), B, C, dtype=dtype)
        logits[0, :, 0], logits[1:, :, 1] = 1e3, 1e3
        logits[0, :, 2] = -1e3
        leaf = logits.requires_grad_()
        also = {n: t.float() for n, t in also_of(method).items()}
        loss = method.loss(shown(leaf, **also, mean_BC=logits[-1].detach()))
        assert loss.isfinite()
        assert torch.autograd.grad(loss, leaf)[0].isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_equal_networks_have_no_divergence(name):
    """Unlabelled and equal: no hard loss, no soft loss, so no gradient."""
    method = ALL[name]
    one = random(B, C)
    logits = one.expand(num_networks(method), -1, -1).clone().requires_grad_()
    also = also_of(method) | {"stale_MBC": logits.detach(), "fused_BC": one, "mean_BC": one}
    extra = {"logits_MBC": logits, **also}
    given = Shown(logits[0], torch.zeros(B, C), None, None, 0.74, also=extra)
    gradient = torch.autograd.grad(method.loss(given), logits)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "field", "refused", "accepted"),
    [
        (OwnMean, "temperature", [0.0, -1.0], [0.01]),
        (OwnMean, "weight", [-0.01], [0.0]),
        (OwnMean, "decay", [-0.01, 1.0], [0.0, 0.999]),
        (OwnMean, "rise", [-0.01, 1.01], [0.0, 1.0]),
        (ProKT, "temperature", [0.0], [0.01]),
        (ProKT, "alpha", [-0.01, 1.01], [0.0, 1.0]),
        (ProKT, "nearness", [-0.01], [0.0]),
        (ProKD, "levels", [0], [1]),
        (ProKD, "regression", [0.0, 1.01], [0.01, 1.0]),
        (DML, "temperature", [0.0], [0.01]),
        (DML, "weight", [-0.01], [0.0]),
        (Codistillation, "every", [0], [1]),
        (Codistillation, "burn_in", [-0.01, 1.0], [0.0, 0.99]),
        (Codistillation, "weight", [-0.01], [0.0]),
        (OKDDip, "temperature", [0.0], [0.01]),
        (OKDDip, "weight", [-0.01], [0.0]),
        (OKDDip, "rise", [-0.01, 1.01], [0.0, 1.0]),
        (OKDDip, "width", [0], [1]),
        (FFL, "temperature", [0.0], [0.01]),
        (FFL, "weight", [-0.01], [0.0]),
        (FFL, "rise", [-0.01, 1.01], [0.0, 1.0]),
        (FFL, "width", [0], [1]),
        (AFD, "temperature", [0.0], [0.01]),
        (AFD, "weight", [-0.01], [0.0]),
        (AFD, "width", [0], [1]),
        (BOC, "temperature", [0.0], [0.01]),
        (BOC, "hard", [-0.01], [0.0]),
        (BOC, "hints", [-0.01], [0.0]),
        (BOC, "soft", [-0.01], [0.0]),
    ],
)
def test_values_out_of_range_are_refused_and_those_at_the_edge_taken(
    method, field, refused, accepted
):
    for value in refused:
        with pytest.raises(ConfigError, match=f"^{field} is {value}; "):
            method(**{field: value})
    for value in accepted:
        assert getattr(method(**{field: value}), field) == value


@pytest.mark.parametrize("method", [DML, Codistillation, OKDDip, FFL])
def test_the_weight_multiplies_the_soft_losses_alone(method):
    logits, also = random(M, B, C), also_of(method())
    none, one, three = (
        float(method(weight=weight).loss(shown(logits, **also))) for weight in (0.0, 1.0, 3.0)
    )
    classifiers = [*logits.tolist(), *([also["fused_BC"].tolist()] if method is FFL else [])]
    assert none == pytest.approx(sum(map(hard, classifiers)))
    assert three - none == pytest.approx(3 * (one - none))


def test_a_student_that_has_followed_its_teacher_learns_from_labels_alone():
    logits = random(2, B, C)
    wanted = hard(logits[0].tolist()) + hard(logits[1].tolist())
    for progress in (0.75, 0.9):
        assert float(ProKD().loss(shown(logits, progress=progress))) == pytest.approx(wanted)


@pytest.mark.parametrize("name", ALL)
def test_in_training_a_learner_answers_with_its_students_logits(name):
    learner, images = learner_of(ALL[name]).train(), pictures().batch(torch.arange(8))
    logits_BC, also = learner(images)
    torch.testing.assert_close(logits_BC, learner.student(images))
    if "logits_MBC" in also:
        everybody = torch.stack([network_(images) for network_ in learner.networks])
        torch.testing.assert_close(also["logits_MBC"], everybody)


@pytest.mark.parametrize("name", PEERS)
def test_networks_of_different_widths_learn_together(name):
    """Each has features of its own number; the first peer is the widest."""
    method = PEERS[name]
    others = [
        nn.Sequential(nn.Conv2d(1, width, 3), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(width, C))
        for width in (5, 9, 7)[: num_networks(method)]
    ]
    learner = method.learner(others[0], others[1:]).train()
    logits_BC, also = learner(pictures().batch(torch.arange(8)))
    labels = label_probs(torch.arange(8) % C, C)
    method.loss(Shown(logits_BC, labels, None, None, 0.9, also=also)).backward()
    assert all(each[0].weight.grad.abs().sum() > 0 for each in others)


def test_a_critic_judges_the_network_before_its_own_in_the_circle():
    """Where all critics are one, the neighbour's features get what the neighbour's own got."""
    learner = AFD().learner(network(0), [network(1), network(2)]).train()
    for critic in learner.critics:
        critic.load_state_dict(learner.critics[0].state_dict())
    _, also = learner(pictures().batch(torch.arange(8)))
    assert also["own_MB"].shape == (3, 8)
    torch.testing.assert_close(also["neighbour_MB"], also["own_MB"].roll(1, dims=0))
    torch.testing.assert_close(also["fooled_MB"], also["own_MB"])


def test_codistillation_sees_of_the_others_what_was_exchanged_last():
    learner = Codistillation(every=3).learner(network(0), [network(1)]).train()
    copies = []
    for done in range(1, 8):
        learner.after_step(done)
        copies.append(weights_of(learner.stale[1].network))
        if done == 3:
            assert copies[-1] == weights_of(learner.peers[0])
        with torch.no_grad():
            learner.peers[0][0].weight += 0.1
    assert copies[2] == copies[3] == copies[4] != copies[5] == copies[6]


def test_codistillation_never_listens_to_untrained_copies():
    """A burn-in may end before the first exchange is due."""
    learner = Codistillation(every=50).learner(network(0), [network(1)]).train()
    untrained = weights_of(learner.stale[1])
    with torch.no_grad():
        learner.peers[0][0].weight += 0.1
    learner.after_step(1)
    assert weights_of(learner.stale[1].network) == weights_of(learner.peers[0])
    assert weights_of(learner.stale[1]) != untrained


def test_codistillation_does_not_listen_during_the_burn_in():
    logits = random(2, B, C)
    given = shown(logits, progress=0.1, stale_MBC=random(2, B, C, seed=1))
    assert float(Codistillation(burn_in=0.2).loss(given)) == pytest.approx(
        hard(logits[0].tolist()) + hard(logits[1].tolist())
    )


def test_the_running_mean_follows_by_its_decay_and_never_trains():
    student = network(0).train()
    mean_ = Frozen(student)
    assert not any(module.training for module in mean_.network.modules())
    assert not any(module.training for module in mean_.train().modules())
    first = student[0].weight.clone()
    with torch.no_grad():
        student[0].weight += 1.0
        student[1].running_mean += 1.0
    mean_.follow(student, decay=0.75)
    torch.testing.assert_close(mean_.network[0].weight, first + 0.25)
    torch.testing.assert_close(mean_.network[1].running_mean, torch.full((8,), 0.25))
    assert not any(p.requires_grad for p in mean_.parameters())


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_untrained_weights_leave_no_trace_in_a_running_mean(decay):
    student = network(0)
    learner = OwnMean(decay=decay).learner(student, [])
    kept, seen = [], []
    for done in range(1, 31):
        with torch.no_grad():
            student[0].weight.fill_(float(done))
        learner.after_step(done)
        seen.append(float(done))
        kept.append(float(learner.mean.network[0].weight.mean()))
    plain = [n for n in range(30) if n / (n + 1) <= decay]
    for n in plain:
        assert kept[n] == pytest.approx(sum(seen[: n + 1]) / (n + 1))
    last = kept[plain[-1]]
    for n in range(len(plain), 30):
        last = decay * last + (1 - decay) * seen[n]
        assert kept[n] == pytest.approx(last)


def test_a_training_brings_the_running_mean_up_to_date_after_each_step():
    method, seen = OwnMean(decay=0.7), []
    learner = learner_of(method)

    def look(done):
        seen.append(learner.student[-1].weight.detach().double().clone())

    settings = {"seed": 0, "num_classes": CLASSES, "method": method, "on_step": look}
    fit(learner, pictures(labelled=20), recipe(epochs=2), **settings)
    wanted = torch.zeros_like(seen[0])
    for step, weight in enumerate(seen):
        stays = min(step / (step + 1), 0.7)
        wanted = stays * wanted + (1 - stays) * weight
    found = learner.mean.network[-1].weight.double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_features_are_what_the_last_layer_is_given():
    student, images = network(), pictures().batch(torch.arange(4))
    logits, features = with_features(student, images)
    torch.testing.assert_close(student[-1](features), logits)
    assert not student[-1]._forward_pre_hooks


def test_a_network_without_a_linear_layer_is_refused():
    with pytest.raises(ConfigError, match="no linear layer"):
        last_linear(nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def gated(seed=0, checkpoint=None, epochs=2):
    ensemble = Ensemble((network(5), network(6)), (0.5, 0.5))
    method = Gated()
    return fit(
        method.learner(network(seed), [], ensemble.described()),
        pictures(labelled=20),
        recipe(epochs=epochs, checkpoint_steps=4),
        seed=0,
        num_classes=CLASSES,
        method=method,
        ensemble=ensemble,
        checkpoint=checkpoint,
    )[0]


def test_without_teachers_there_is_no_gate():
    """As in the first generation of a born-again student."""
    student = network()
    assert Gated().learner(student, []) is student


def test_a_gated_student_resumes_to_the_same_bits():
    whole, memory = gated(), Memory(stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        gated(checkpoint=memory)
    memory.stop_after = None
    assert weights_of(gated(seed=9, checkpoint=memory)) == weights_of(whole)
    assert whole.gate.weight.abs().sum() > 0


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("mixing", ["probabilities", "logits"])
def test_the_gate_learns_from_the_labels_alone_and_the_student_moves_it_not(mixing, standardize):
    """Its gradient is that of the cross-entropy of what the student gets, whatever that says."""
    logits_KBC = random(2, B, C)
    rows = logits_KBC.transpose(0, 1).flatten(1)
    members = Members(("a", "b"), (0.25, 0.75), mixing)
    labels = label_probs(torch.tensor([0, 1, 2, 3, 4, -1]), C)
    gradients = []
    for seed in (1, 2):
        weight = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        also = {"gate_weight": weight, "gate_bias": bias}
        Gated(standardize=standardize).loss(
            Shown(random(B, C, seed=seed), labels, rows, members, 0.5, also=also)
        ).backward()
        gradients.append(bias.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    scores = torch.tensor([0.25, 0.75], dtype=torch.float64).log().requires_grad_()
    weights = scores.softmax(0)
    if standardize:
        centred = logits_KBC - logits_KBC.mean(2, keepdim=True)
        logits_KBC = centred / centred.std(2, keepdim=True)
    if mixing == "logits":
        mixed = torch.einsum("k,kbc->bc", weights, logits_KBC).log_softmax(1)
    else:
        mixed = torch.einsum("k,kbc->bc", weights, logits_KBC.softmax(2)).log()
    (-(labels * mixed).sum(1).mean()).backward()
    torch.testing.assert_close(gradients[0], scores.grad, rtol=1e-5, atol=1e-6)


def test_a_gate_that_is_quite_sure_has_a_finite_gradient():
    logits_KBC = random(2, B, C)
    gates = {"gate_weight": torch.zeros(2, 4), "gate_bias": torch.tensor([500.0, -500.0])}
    also = {name: parameter.requires_grad_() for name, parameter in gates.items()}
    rows = logits_KBC.float().transpose(0, 1).flatten(1)
    labels = label_probs(torch.arange(B) % C, C)
    members = Members(("a", "b"), (0.5, 0.5))
    Gated().loss(Shown(random(B, C).float(), labels, rows, members, 0.5, also=also)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in gates.values())


def test_a_new_gate_leaves_the_ensembles_weights_as_they_are():
    logits, teachers = random(B, C), random(2, B, C, seed=1)
    members = Members(("a", "b"), (0.25, 0.75))
    new = Gated().learner(network(), [], members).gate.double().requires_grad_(False)
    zero = {"gate_weight": new.weight, "gate_bias": new.bias}
    labels = torch.zeros(B, C)
    rows = teachers.transpose(0, 1).flatten(1)
    ours = Gated(alpha=1.0).loss(Shown(logits, labels, rows, members, 0.5, also=zero))
    soft_rows = [
        reference.mixture([t[b] for t in teachers.tolist()], [0.25, 0.75], 4.0) for b in range(B)
    ]
    assert float(ours) == pytest.approx(soft(logits.tolist(), soft_rows, 4.0), rel=1e-5)
