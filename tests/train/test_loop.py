import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from kd.component import ConfigError
from kd.data import Augment, key
from kd.ensemble import Ensemble
from kd.evaluate import predict, scores
from kd.methods import DML, KD, AnnealedKD, ContinuationKD, Frozen, ProKD
from kd.methods.trust import Correctness
from kd.recipe import SGD, AdamW, Cosine, Steps
from kd.train import (
    Lesson,
    LossWatch,
    NonFiniteLoss,
    Plan,
    Stopped,
    TeacherChanged,
    batch_of,
    fit,
    mixed,
    steps_in_epoch,
)
from kd.train.state import Saves
from tests.learners import CLASSES, Memory, network, pictures, recipe, taught, weights_of


def train(seed=0, model=None, images=None, checkpoint=None, device="cpu", **changes):
    model = network(0) if model is None else model
    images = pictures(device=device) if images is None else images
    ours = ("method", "ensemble", "epoch_steps", "tables", "stop")
    settings = {k: changes.pop(k) for k in ours if k in changes}
    return fit(
        model,
        images,
        recipe(**changes),
        seed=seed,
        num_classes=CLASSES,
        checkpoint=checkpoint,
        **settings,
    )


def test_training_learns():
    images = pictures()
    model, history = train(images=images, epochs=15)
    assert scores(predict(model, images), images.labels_N).accuracy > 0.9
    assert history[-1].train_loss < history[0].train_loss / 2


VARIANTS = {
    "labels": {},
    "taught": taught(),
    "adamw": {"optimizer": AdamW()},
    "ema": {"ema": 0.9},
    "mixup": {"mixup": 0.4, **taught()},
    "bf16": {"precision": "bf16"},
    "contiguous": {"memory_format": "contiguous", **taught()},
    "clipped": {"clip_norm": 0.1},
    "dropout": {"model": 0.5},
    "dropout under the mean": {"model": 0.5, "ema": 0.9},
    "not fused": {"optimizer": SGD(fused=False)},
    "online": {"targets": "online", **taught()},
    "stacked": {"targets": "stacked", **taught()},
    "cached": {"targets": "cached", "views": None, **taught()},
    "recurring views": {"targets": "cached", "views": 2, **taught()},
}


def model_for(variant):
    return network(0, dropout=VARIANTS[variant].get("model", 0.0))


def settings_for(variant):
    return {k: v for k, v in VARIANTS[variant].items() if k != "model"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_seed_gives_the_same_bits(variant, device):
    first, _ = train(model=model_for(variant), device=device, **settings_for(variant))
    second, _ = train(model=model_for(variant), device=device, **settings_for(variant))
    assert weights_of(first) == weights_of(second)


def test_another_seed_gives_other_weights():
    assert weights_of(train(seed=0)[0]) != weights_of(train(seed=1)[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop_after", [1, 5, 8, 15], ids="after_step_{}".format)
def test_a_stopped_run_resumes_to_the_same_bits(variant, stop_after, device):
    """3 epochs of 5 steps: stopped at an epoch's first step, at its last, amid it, at the end."""
    settings = {**settings_for(variant), "checkpoint_steps": 1, "device": device}
    whole, history = train(model=model_for(variant), **settings)
    memory = Memory(stop_after)
    with pytest.raises(KeyboardInterrupt):
        train(model=model_for(variant), checkpoint=memory, **settings)
    fresh = network(99, dropout=VARIANTS[variant].get("model", 0.0))
    resumed, resumed_history = train(model=fresh, checkpoint=memory, **settings)
    assert weights_of(resumed) == weights_of(whole)
    assert [e.train_loss for e in resumed_history] == [e.train_loss for e in history]


def test_a_run_that_is_asked_to_stop_saves_its_state_and_goes_on_from_there():
    whole, _ = train(checkpoint_minutes=1e9)
    memory, steps = Memory(), iter([False] * 3 + [True])
    with pytest.raises(Stopped, match="after step 4"):
        train(checkpoint=memory, checkpoint_minutes=1e9, stop=lambda: next(steps))
    assert memory.saves == 1
    resumed, _ = train(model=network(99), checkpoint=memory, checkpoint_minutes=1e9)
    assert memory.saves == 2
    assert weights_of(resumed) == weights_of(whole)


def test_a_state_is_saved_as_often_as_the_recipe_says_and_at_the_end():
    for settings, expected in (
        ({"checkpoint_steps": 4, "checkpoint_minutes": 1e9}, 4),
        ({"checkpoint_minutes": 0.0}, 16),
        ({"checkpoint_minutes": 1e9}, 1),
    ):
        memory = Memory()
        trained, history = train(checkpoint=memory, **settings)
        assert memory.saves == expected
        again, same = train(model=network(99), checkpoint=memory, **settings)
        assert memory.saves == expected
        assert (weights_of(again), same) == (weights_of(trained), history)


def test_a_state_is_saved_by_the_clock_once_in_so_many_minutes(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("kd.train.state.time.monotonic", lambda: now[0])
    saves, due = Saves(recipe(checkpoint_minutes=2.0)), []
    for _ in range(8):
        now[0] += 50
        due.append(saves.due(done=1, stopping=False))
    assert due == [False, False, True, False, False, True, False, False]


def test_every_pass_shows_every_image_once_and_every_batch_is_full():
    num, size, passes = 13, 4, 8
    augment = Augment(shift=1)
    batches = [batch_of(step, size, num, augment, seed=3) for step in range(num * passes // size)]
    assert all(len(shown.indices_B) == len(shown.views_B) == size for shown in batches)
    seen = torch.cat([shown.indices_B for shown in batches]).view(passes, num)
    assert all(sorted(row.tolist()) == list(range(num)) for row in seen)
    assert len({tuple(row.tolist()) for row in seen}) == passes
    views = torch.cat([shown.views_B for shown in batches])
    assert views.unique().numel() == augment.num_views


def test_a_batch_may_be_larger_than_the_images():
    indices = batch_of(0, 10, 4, Augment(), seed=0).indices_B
    assert indices.bincount().tolist() == [3, 3, 2, 2] or sorted(indices.bincount()) == [
        2,
        2,
        3,
        3,
    ]


def test_a_budget_in_steps_is_the_same_however_few_images_there_are():
    steps = steps_in_epoch(40, 8)
    _, few = train(images=pictures(6), epoch_steps=steps)
    _, many = train(images=pictures(40))
    assert [epoch.step for epoch in few] == [epoch.step for epoch in many]


def frozen_network():
    return network().requires_grad_(False)


class Pairs(nn.Module):
    """A network that returns more than logits."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, images):
        return {"logits": self.inner(images)}


def ensemble_of(*members):
    return {"method": KD(), "ensemble": Ensemble(members, (1 / len(members),) * len(members))}


def broken(value):
    teacher = network()
    nn.init.constant_(teacher[-1].bias, value)
    return teacher


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"images": pictures(8, labelled=0)}, "labels_N is '-1 for all images'; it must be known"),
        (
            {"images": replace(pictures(8), labels_N=torch.arange(8) % CLASSES + 1)},
            r"labels_N is 'in 1\.\.3'; it must be in 0\.\.2 \(num_classes is 3\), or -1",
        ),
        ({"model": frozen_network()}, "with requires_grad is 0; .* an Ensemble freezes its mem"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 1))}, r"\(2, 1\).* shape \(2, 3\)"),
        ({"model": Pairs()}, "the network returns dict; it must return logits of shape"),
        ({"method": DML()}, r"DML.loss looks up 'logits_MBC', .*train what DML\(\)\.learner"),
        ({"ensemble": Ensemble((network(),), (1.0,))}, "method is None; it must be given with"),
        (ensemble_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 4))), r"'0' returns is .*\(2, 4\)"),
        (ensemble_of(network(), Pairs()), "the teacher '1' returns is 'dict'; it must be for two"),
        (ensemble_of(broken(math.nan)), "the teacher '0' returns is 'not finite'; .*retrain it"),
    ],
)
def test_what_nothing_right_can_be_learned_from_is_refused_at_the_start(given, said):
    with pytest.raises(ConfigError, match=said):
        train(**given)


def test_teachers_and_weights_may_be_lists():
    ensemble = Ensemble([network(1), network(2)], torch.tensor([0.5, 0.5]))
    assert ensemble.members == tuple(ensemble.members)
    assert ensemble.weights_K == (0.5, 0.5)
    train(epochs=1, method=KD(), ensemble=ensemble)


@pytest.mark.parametrize("method", [None, KD(alpha=1e-9)])  # at 0 labelled images alone are shown
def test_the_hard_loss_is_the_mean_over_the_labelled_images_however_they_fall(method):
    images, settings = pictures(40, labelled=10, augment=Augment()), recipe(batch_size=8)
    model = network(0).eval()  # else each batch would be normalised by itself
    known = {} if method is None else taught()
    lesson = Lesson(images, settings, 0, CLASSES, method, known.get("ensemble"))
    losses = torch.stack([lesson.loss(model, step) for step in range(5)])
    labelled = images.labels_N >= 0
    assert labelled.sum() == 10
    logits = model(images.batch(labelled.nonzero()[:, 0], torch.zeros(10, dtype=torch.int64)))
    expected = nn.functional.cross_entropy(logits, images.labels_N[labelled])
    torch.testing.assert_close(losses.mean(), expected)


@pytest.mark.parametrize("method", [AnnealedKD(), ContinuationKD(), KD(alpha=0.0)])
def test_where_labels_alone_teach_labelled_images_alone_are_shown(method):
    """As in the papers' second stages; a batch of all images would have few labels or none."""
    images = pictures(40, labelled=10, augment=Augment())
    settings = recipe(batch_size=8, targets="online")
    lesson = Lesson(images, settings, 0, CLASSES, method, taught()["ensemble"], num_steps=20)
    known = images.batch(torch.arange(10), torch.zeros(10, dtype=torch.int64))
    model, shown, asked = network(0).eval(), [], []
    model.register_forward_pre_hook(lambda module, given: shown.append(given[0]))
    for member in lesson.targets.asked:
        member.register_forward_pre_hook(lambda module, given: asked.append(module))

    def unknown(images_B):
        return int((images_B[:, None] != known).flatten(start_dim=2).any(dim=2).all(dim=1).sum())

    losses = torch.stack([lesson.loss(model, step) for step in range(15, 20)])
    assert [unknown(images_B) for images_B in shown] == [0] * 5
    assert asked == []
    expected = nn.functional.cross_entropy(model(known), images.labels_N[:10])
    torch.testing.assert_close(losses.mean(), expected)  # 40 images: each label four times
    lesson.loss(model, 0)
    assert (unknown(shown[-1]) > 0) is not method.labels_alone(0.0)
    assert bool(asked) is not method.labels_alone(0.0)


def test_a_follower_is_shown_labelled_images_alone_once_it_has_followed():
    assert [ProKD(pool=True).labels_alone(progress) for progress in (0.7, 0.8)] == [False, True]


def test_a_student_learns_from_unlabelled_images():
    labelled = pictures(120)
    teacher, _ = train(images=labelled, epochs=15)
    unlabelled = pictures(120, labelled=0)
    student, _ = train(
        seed=1,
        model=network(1),
        images=unlabelled,
        epochs=15,
        ensemble=Ensemble((teacher,), (1.0,)),
        method=KD(alpha=1.0),
    )
    assert scores(predict(student, labelled), labelled.labels_N).accuracy > 0.9


def test_no_gradient_reaches_the_members_and_none_of_them_changes():
    settings = taught()
    before = settings["ensemble"].fingerprint()
    train(**settings)
    assert settings["ensemble"].fingerprint() == before
    for member in settings["ensemble"].members:
        assert all(parameter.grad is None for parameter in member.parameters())


def test_a_member_that_changes_is_noticed():
    settings = taught()
    member = settings["ensemble"].members[0]

    def disturb(epoch):
        member[1].running_mean += 1

    with pytest.raises(TeacherChanged):
        fit(
            network(),
            pictures(),
            recipe(targets="online"),
            seed=0,
            num_classes=CLASSES,
            on_epoch=disturb,
            **settings,
        )


def test_a_model_in_evaluation_mode_is_trained_in_training_mode_and_comes_back_evaluating():
    model = network().eval()
    modes = []

    def validate(learning):
        modes.append(learning.training)
        return {}

    fitted, _ = fit(model, pictures(), recipe(), seed=0, num_classes=CLASSES, validate=validate)
    assert modes == [False] * 3
    assert not fitted.training
    assert not torch.equal(model[1].running_mean, torch.zeros(8))  # statistics were gathered


def test_a_loss_that_was_never_finite_is_not_blamed_on_the_learning_rate():
    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, images):
            return self.inner(images) / 0

    with pytest.raises(NonFiniteLoss, match=r"step 0 .* look for a division by 0"):
        train(model=Divides())


def test_a_loss_that_is_not_finite_stops_with_its_step():
    class Bomb(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = network(), 0

        def forward(self, images):
            self.calls += 1
            return self.inner(images) * (math.nan if self.calls == 8 else 1.0)

    with pytest.raises(NonFiniteLoss, match=r"step 7 \(epoch 2\)"):
        train(model=Bomb())


def test_weights_that_are_not_finite_never_become_a_checkpoint():
    memory = Memory()
    model = network()

    class LastStepExplodes(SGD):
        def build(self, parameters):
            optimizer = super().build(parameters)

            def explode(*_):
                if len(memory.saved[1] if memory.saved else []) == 1:
                    with torch.no_grad():
                        model[0].weight[0] = math.inf

            optimizer.register_step_post_hook(explode)
            return optimizer

    settings = {"checkpoint_steps": 1, "optimizer": LastStepExplodes(lr=0.05)}
    with pytest.raises(NonFiniteLoss, match="epoch 2"):
        train(model=model, checkpoint=memory, **settings)
    assert memory.saves == 6
    assert all(tensor.isfinite().all() for tensor in memory.saved[0].values())


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("targets", ["online", "cached"])
def test_a_class_may_have_a_single_image(num, targets):
    """Fewer images than a batch, or than what is tried beforehand."""
    settings = recipe(epochs=1, targets=targets)
    fit(network(), pictures(num), settings, seed=0, num_classes=CLASSES, **taught())


def test_the_watch_names_the_first_bad_step():
    watch = LossWatch(4, torch.device("cpu"))
    for step, loss in enumerate([1.0, math.inf, math.nan, 2.0], start=8):
        watch.see(step, torch.tensor(loss))
    with pytest.raises(NonFiniteLoss, match=r"step 9 \(epoch 3\)"):
        watch.check(12, 3)


@pytest.mark.parametrize("kind", [Cosine(warmup=0.25), Steps(milestones=(0.5,), warmup=0.25)])
def test_no_step_is_taken_at_rate_0(kind):
    plan = Plan(recipe(epochs=2, schedule=kind, optimizer=SGD(lr=0.4)), per_epoch=10)
    rates = [plan.lr(step) for step in range(20)]
    assert min(rates) > 0
    assert max(rates) <= 0.4
    assert rates[0] < rates[1] < rates[4]
    assert rates[-1] < 0.2


@pytest.mark.parametrize(
    ("every", "wanted"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])]
)
def test_validation_comes_every_so_many_epochs_and_after_the_last(every, wanted):
    plan = Plan(recipe(epochs=5, validate_every=every), per_epoch=10)
    assert [epoch + 1 for epoch in range(5) if plan.validates(epoch)] == wanted


def test_steps_drop_at_their_milestones():
    schedule = Steps(milestones=(0.5, 0.75), gamma=0.1)
    plan = Plan(recipe(epochs=1, schedule=schedule, optimizer=SGD(lr=1.0)), per_epoch=100)
    rates = [round(plan.lr(step), 6) for step in (0, 49, 50, 74, 75, 99)]
    assert rates == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]


def test_mixup_mixes_images_and_labels_alike():
    images = torch.rand(6, 1, 4, 4)
    labels = torch.eye(6)
    new_images, new_labels = mixed(images, labels, 0.4, seed=0, step=3)
    share = float(new_labels[0, 0])
    assert 0 < share < 1
    torch.testing.assert_close(new_images, share * images + (1 - share) * images.flip(0))
    torch.testing.assert_close(new_labels.sum(1), torch.ones(6))


@pytest.mark.parametrize("alpha", [0.5, 0.01])
def test_mixing_shares_follow_a_beta_distribution(alpha):
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1))."""
    labels = torch.eye(2)
    shares = [
        float(mixed(torch.zeros(2, 1, 1, 1), labels, alpha, seed=0, step=s)[1][0, 0])
        for s in range(3000)
    ]
    shares = torch.tensor(shares)
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.01)


def test_seeds_of_neighbouring_parts_and_other_purposes_differ():
    keys = {key(p, a, b) for p in ("epoch", "mixup") for a in range(30) for b in range(30)}
    assert len(keys) == 1800


def test_weights_that_layers_share_move_once_in_the_running_mean():
    inner = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(inner.weight)
    mean = Frozen(nn.Sequential(inner, nn.ReLU(), inner))
    moved = nn.Linear(4, 4, bias=False)
    nn.init.ones_(moved.weight)
    mean.follow(nn.Sequential(moved, nn.ReLU(), moved), decay=0.9)
    torch.testing.assert_close(mean.network[0].weight, torch.full((4, 4), 0.1))


def test_teachers_are_not_weighed_by_the_labels_of_mixed_images():
    who = taught()["ensemble"]
    with pytest.raises(ConfigError, match=r"recipe\.mixup is 0\.4; it must be 0"):
        train(method=KD(trust=Correctness()), ensemble=who, mixup=0.4)


@pytest.mark.parametrize("name", ["precision", "memory_format", "compile"])
def test_what_is_left_to_the_machine_is_settled_before_training(name):
    with pytest.raises(ConfigError, match=rf"recipe\.{name} is 'auto'; it must be settled"):
        train(**{name: "auto"})


def test_a_compiler_that_says_nothing_is_quoted_by_its_error_s_name(monkeypatch):
    class Uncompilable(nn.Module):
        def forward(self, images_BCHW):
            raise torch._dynamo.exc.TorchDynamoException

    monkeypatch.setattr("kd.train.loop.compiled", lambda model: Uncompilable())
    with pytest.raises(ConfigError, match=r"compiled here \(TorchDynamoException\(\)\)"):
        train(compile=True)


def test_a_training_that_is_asked_to_stop_while_teachers_are_asked_stops_there():
    memory = Memory()
    with pytest.raises(Stopped, match="while computing a teacher's table"):
        train(checkpoint=memory, stop=lambda: True, targets="cached", **taught())
    assert memory.saves == 0


def test_the_running_mean_of_the_weights_after_each_step_is_what_is_returned():
    model, seen = network(0), []

    def look(done):
        seen.append(model[-1].weight.detach().double().clone())

    settings = {"seed": 0, "num_classes": CLASSES, "on_step": look}
    with_mean, _ = fit(model, pictures(), recipe(ema=0.7), **settings)
    wanted = torch.zeros_like(seen[0])
    for step, weight in enumerate(seen):
        stays = min(step / (step + 1), 0.7)
        wanted = stays * wanted + (1 - stays) * weight
    assert len(seen) == 15
    torch.testing.assert_close(with_mean[-1].weight.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("longest", [0.01, 0.1])
def test_a_long_gradient_is_cut_to_the_length_that_was_asked_for(longest):
    plain = SGD(lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
    settings = {"optimizer": plain, "schedule": Steps(milestones=()), "epochs": 1}
    before, model = network(0), network(0)
    train(model=model, epoch_steps=1, clip_norm=longest, **settings)
    pairs = zip(before.parameters(), model.parameters(), strict=True)
    moved = torch.cat([(old - new).flatten() for old, new in pairs]).detach()
    assert float(moved.norm()) == pytest.approx(longest, rel=1e-3)


def test_cached_and_online_targets_train_alike():
    cached, _ = train(**taught(), targets="cached")
    online, _ = train(**taught(), targets="online")
    images = pictures()
    torch.testing.assert_close(
        predict(cached, images), predict(online, images), rtol=1e-3, atol=1e-3
    )
