"""The defects found in public distillation code, each as a test that it is not ours.

Numbers are those of the list in docs/methods.md.  B batch, K members, C classes.
"""

import math
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from kd.component import ConfigError
from kd.ensemble import Ensemble
from kd.methods import (
    BOC,
    DKD,
    DML,
    FFL,
    KD,
    MLKD,
    Members,
    OKDDip,
    Shown,
    SoftTargets,
    VirtualTeacher,
    label_probs,
    soft_loss,
)
from kd.methods.learner import Cohort, Frozen
from kd.methods.losses import log_probs
from kd.methods.trust import Confidence, Correctness, Drop, Entropy, MinNorm
from kd.recipe import SGD, Steps
from kd.train import Plan, fit
from kd.train.plan import batch_of
from kd.train.targets import targets_of
from tests.checks_methods import batch, gradient_of, loss_of, unlabelled
from tests.learners import CLASSES, Guarded, network, pictures, recipe
from tests.methods.test_online import learner_of

PROJECT = Path(__file__).parents[2]
K = 3
UNIFORM = Members(("0", "1", "2"), (1 / 3,) * 3)


def seen_by(model):
    """What a module is given, call by call, and in which mode."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, given: seen.append((given[0].clone(), module.training))
    )
    return seen


def student_under(teacher, method=None, **settings):
    student = network(1)
    return fit(
        student,
        pictures(),
        recipe(targets="online", **settings),
        seed=0,
        num_classes=CLASSES,
        method=method or KD(),
        ensemble=Ensemble((teacher,), (1.0,)),
        validate=lambda model: {"accuracy": float(model.training)},
    )


def test_trap_1_the_divergence_is_summed_over_classes_and_never_divided_by_them():
    logits, teachers, _ = batch(num_classes=100)
    targets = log_probs(teachers[0], 4.0)
    each = F.kl_div(log_probs(logits, 4.0), targets, log_target=True, reduction="none")
    torch.testing.assert_close(soft_loss(logits, targets, 4.0), 100 * 16 * each.mean())


def test_trap_2_the_square_of_the_temperature_is_there_without_labels_and_at_alpha_1():
    logits, teachers, labels = batch()
    loss = loss_of(KD(alpha=1.0, temperature=8.0), logits, teachers[:1], unlabelled(labels))
    plain = F.kl_div(
        log_probs(logits, 8.0), log_probs(teachers[0], 8.0), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(loss, 64 * plain)


def test_trap_3_the_learning_rate_drops_at_its_milestones():
    settings = recipe(epochs=10, schedule=Steps(milestones=(0.5, 0.75)), optimizer=SGD(lr=0.1))
    plan = Plan(settings, per_epoch=10)
    assert [round(plan.lr(step), 6) for step in (49, 50, 76)] == [0.1, 0.01, 0.001]


def test_trap_4_members_are_dropped_by_who_they_are_not_by_what_they_say():
    torch.manual_seed(1)
    same = torch.zeros(3, 2, 4)  # equal answers, which `list.remove` would confuse
    kept = torch.stack([Drop(keep=0.5).factors(same, UNIFORM)[0] for _ in range(50)])
    assert len({tuple(row.tolist()) for row in kept}) == 7  # every choice but none at all


def test_trap_5_the_student_is_in_training_mode_at_every_step_though_it_is_validated():
    student, modes = network(1), []
    seen = seen_by(student)
    settings = {"seed": 0, "num_classes": CLASSES}
    fit(
        student,
        pictures(),
        recipe(),
        validate=lambda m: modes.append(m.training) or {},
        **settings,
    )
    steps = [training for images, training in seen if len(images) == 8 and images.shape[2] == 8]
    assert sum(steps) >= 15  # 3 epochs of 5 steps
    assert modes == [False] * 3


def test_trap_6_no_wrapper_puts_a_teacher_into_training_mode():
    teacher = network(0)
    learner = Cohort(network(1), [])
    learner.teacher = Frozen(teacher)
    learner.train()
    before = {name: tensor.clone() for name, tensor in learner.teacher.state_dict().items()}
    for _ in range(3):
        learner.teacher(pictures().batch(torch.arange(8)))
    assert not any(module.training for module in learner.teacher.modules())
    assert all(t.equal(before[name]) for name, t in learner.teacher.state_dict().items())


def test_trap_7_teachers_build_no_graph_and_are_no_parameters_of_the_optimiser():
    teacher, graphs = network(0), []
    teacher.register_forward_hook(
        lambda module, given, logits: graphs.append(logits.requires_grad)
    )
    student_under(teacher)
    assert graphs
    assert not any(graphs)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_trap_8_a_peers_loss_moves_nobody_else():
    learner = learner_of(DML()).train()
    images, labels = pictures().batch(torch.arange(8)), label_probs(torch.arange(8) % 3, 3)
    logits, also = learner(images)
    whole = DML().loss(Shown(logits, labels, None, None, 0.5, also=also))
    parameter = learner.student[0].weight
    (together,) = torch.autograd.grad(whole, parameter, retain_graph=True)
    held = {"logits_MBC": torch.cat([also["logits_MBC"][:1], also["logits_MBC"][1:].detach()])}
    own = DML().loss(Shown(logits, labels, None, None, 0.5, also=held))
    torch.testing.assert_close(together, torch.autograd.grad(own, parameter)[0])


def test_trap_9_whether_targets_carry_gradients_is_an_option_with_a_safe_default():
    assert OKDDip().detach is True


def test_trap_10_a_hint_reaches_the_student():
    method = BOC(hard=0.0, soft=0.0, hints=1.0)
    learner = learner_of(method).train()
    logits, also = learner(pictures().batch(torch.arange(8)))
    method.loss(Shown(logits, torch.zeros(8, CLASSES), None, None, 0.5, also=also)).backward()
    assert learner.student[0].weight.grad.abs().sum() > 0
    assert not learner.peers[0][0].weight.grad.any()  # the pseudo-teacher is not moved by it


def test_trap_11_weights_by_image_sum_to_1_and_gradient_weights_need_no_pass_of_their_own():
    logits, teachers, labels = batch()
    for trust in (Confidence(), Entropy(), Correctness()):
        rows = SoftTargets((1 / K,) * K, (4.0,), trust=trust)(teachers, labels)
        probs = rows[:, : logits.shape[1]].exp().sum(dim=1)
        torch.testing.assert_close(probs, torch.ones_like(probs))
    student = network(1)
    seen = seen_by(student)
    ensemble = Ensemble((network(2), network(3)), (0.5, 0.5))
    settings = recipe(epochs=1, targets="online", validate_every=1)
    fit(
        student,
        pictures(),
        settings,
        seed=0,
        num_classes=CLASSES,
        method=KD(trust=MinNorm()),
        ensemble=ensemble,
    )
    assert sum(training for _, training in seen) <= 7  # 5 steps, and two to predict memory


def test_trap_12_the_entropy_of_a_sure_teacher_is_a_number():
    sure = log_probs(torch.tensor([[[1e4, 0.0, -1e4]], [[0.0, 0.0, 0.0]]]))
    assert Entropy().factors(sure, torch.tensor([0])).tolist() == [[1.0, 0.0]]


def test_trap_13_dkd_of_a_sure_student_in_half_precision_is_a_number():
    logits = torch.tensor([[6e4, 0.0, -6e4]], dtype=torch.float16)
    teachers = torch.tensor([[[-6e4, 6e4, 0.0]]])
    for label in (0, 1, 2):
        assert gradient_of(DKD(), logits, teachers, torch.tensor([label])).isfinite().all()


def test_trap_14_no_epsilon_changes_targets_and_none_vanishes_in_half_precision():
    _, teachers, labels = batch()
    rows = SoftTargets((1 / K,) * K, (4.0,))(teachers, labels)
    torch.testing.assert_close(rows.exp().sum(dim=1), torch.ones(len(rows)).double())
    flat = torch.ones(2, 5, dtype=torch.float16)  # no spread at all
    method = KD(standardize=True)
    assert gradient_of(method, flat, flat.float()[None], torch.tensor([0, 1])).isfinite().all()


def test_trap_15_two_classes_are_refused_where_they_say_nothing():
    with pytest.raises(ConfigError, match="two classes"):
        loss_of(KD(standardize=True), *batch(num_classes=2))
    pair = batch(num_classes=2)
    torch.testing.assert_close(loss_of(DKD(others=8.0), *pair), loss_of(DKD(others=0.0), *pair))


def test_trap_16_a_cached_row_is_that_of_the_very_image_and_view_whatever_the_order():
    images = pictures()
    ensemble = Ensemble((network(0), network(1)), (0.3, 0.7))
    reduction = KD(trust=Correctness()).reduction(ensemble.described())
    cached, online = (
        targets_of(ensemble, reduction, images, recipe(targets=path), CLASSES)
        for path in ("cached", "online")
    )
    for step in (0, 7, 23):
        given = batch_of(step, 8, len(images), images.augment, 3, cached.views)
        batch_ = images.batch(given.indices_B, given.views_B)
        torch.testing.assert_close(
            cached.rows(batch_, given), online.rows(batch_, given), rtol=1e-2, atol=1e-2
        )


def test_trap_17_teacher_and_student_see_the_same_pixels_normalised_alike():
    teacher, student = Guarded(network(0)), network(1)  # no folded copy is asked in its place
    theirs, ours = seen_by(teacher), seen_by(student)
    ensemble = Ensemble((teacher,), (1.0,))
    settings = recipe(targets="online", epochs=1)
    fit(student, pictures(), settings, seed=0, num_classes=3, method=KD(), ensemble=ensemble)
    steps = [images for images, training in ours if training][-5:]
    for one, other in zip(steps, [images for images, _ in theirs][-5:], strict=True):
        assert torch.equal(one, other)


def test_trap_18_nothing_is_chosen_on_the_test_split_and_training_looks_at_no_split_to_choose():
    dag = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
    readers = {
        name
        for name, stage in dag.items()
        if any("data/test" in str(each) for each in stage.get("do", stage)["deps"])
    }
    assert readers == {"report"}
    ends = [
        fit(
            network(1),
            pictures(),
            recipe(),
            seed=0,
            num_classes=3,
            validate=lambda m, sign=sign: {"accuracy": sign * m.training},
        )[0]
        for sign in (1.0, -1.0)
    ]
    assert all(map(torch.equal, ends[0].state_dict().values(), ends[1].state_dict().values()))


def test_trap_19_figures_stand_at_the_step_they_belong_to():
    _, history = student_under(network(0))
    assert [epoch.step for epoch in history] == [5, 10, 15]
    assert [epoch.number for epoch in history] == [1, 2, 3]


def test_trap_20_mlkd_uses_every_temperature_and_an_images_weight_weighs_that_image():
    logits, teachers, labels = batch()
    whole = loss_of(MLKD(temperatures=(2.0, 6.0)), logits, teachers, labels)
    parts = [loss_of(MLKD(temperatures=(t,)), logits, teachers, labels) for t in (2.0, 6.0)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    reduction = KD(trust=Correctness()).reduction(UNIFORM)
    rows = reduction(teachers, unlabelled(labels))
    rows[:, -1] = 0
    rows[4, -1] = 1.0
    given = Shown(logits, torch.zeros_like(logits), rows, UNIFORM)
    alone = Shown(logits[4:5], torch.zeros(1, logits.shape[1]), rows[4:5], UNIFORM)
    method = KD(alpha=1.0, trust=Correctness())
    torch.testing.assert_close(method.loss(given), method.loss(alone))


def test_trap_21_the_hard_loss_is_at_temperature_1_and_probabilities_are_never_divided_by_one():
    given = batch()
    cold, hot = (loss_of(KD(alpha=0.0, temperature=t), *given) for t in (1.0, 20.0))
    torch.testing.assert_close(cold, hot)
    sure = torch.tensor([[math.log(0.99), *[math.log(0.01 / 2)] * 2]])
    loss = loss_of(
        VirtualTeacher(alpha=1.0, temperature=20.0), sure, sure[None], torch.tensor([0])
    )
    assert float(loss) == pytest.approx(0, abs=1e-4)  # its own logits satisfy the virtual teacher


def test_trap_22_no_part_of_a_method_depends_on_the_size_of_a_batch():
    for method in (FFL(), OKDDip(), BOC()):
        learner = learner_of(method).train()
        for size in (8, 3, 5):
            logits, also = learner(pictures().batch(torch.arange(size)))
            labels = label_probs(torch.arange(size) % 3, 3)
            assert method.loss(Shown(logits, labels, None, None, 0.5, also=also)).isfinite()


def test_trap_23_no_dependency_of_the_core_is_pinned_to_one_version():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert not any("==" in each for each in project["dependencies"])


def test_trap_24_what_is_kept_is_the_student_without_teachers_or_peers():
    learned, _ = student_under(network(0))
    assert learned.state_dict().keys() == network(1).state_dict().keys()
    learner = learner_of(DML())
    assert learner.student.state_dict().keys() == network(1).state_dict().keys()


@pytest.mark.parametrize("path", sorted(PROJECT.glob("params.compare*.yaml")), ids=str)
def test_trap_25_every_comparison_has_its_controls_and_shows_the_worst_class(path):
    from kd.compare.plan import read_with_base
    from kd.compare.report import MEASURES

    cells = read_with_base(path)["cells"]
    assert any(cell["teachers"] == "none" for cell in cells.values())
    assert "test_worst_class_accuracy" in MEASURES


def test_all_twenty_five_traps_are_here():
    names = [name for name in globals() if name.startswith("test_trap_")]
    assert sorted(int(name.split("_")[2]) for name in names) == list(range(1, 26))
