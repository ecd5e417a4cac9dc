"""kd/evaluate.py against plain loops (tests/reference_metrics.py), and at its edges."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from kd import evaluate
from tests import reference_metrics as reference


def a_batch(num_samples: int = 200, num_classes: int = 7, scale: float = 3.0, seed: int = 0):
    made = torch.Generator().manual_seed(seed)
    logits_NC = torch.randn(num_samples, num_classes, generator=made) * scale
    noise_NC = torch.randn(num_samples, num_classes, generator=made) * scale
    return logits_NC, (logits_NC + noise_NC).argmax(1)  # labels that are often, not always, right


@pytest.mark.parametrize("num_classes", [2, 7, 100])
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 1e3])
@pytest.mark.parametrize("num_samples", [1, 2, 200])
def test_scores_equal_the_plain_loops(num_samples: int, scale: float, num_classes: int) -> None:
    logits_NC, labels_N = a_batch(num_samples, num_classes, scale)
    rows, labels = logits_NC.double().tolist(), labels_N.tolist()
    found = evaluate.scores(logits_NC, labels_N)
    assert found.accuracy == pytest.approx(reference.accuracy(rows, labels))
    assert found.nll == pytest.approx(reference.nll(rows, labels), abs=1e-12)
    assert found.ece == pytest.approx(reference.ece(rows, labels), abs=1e-12)
    worst = reference.worst_class_accuracy(rows, labels)
    assert found.worst_class_accuracy == pytest.approx(worst)
    assert evaluate.confusion(logits_NC, labels_N).tolist() == reference.confusion(rows, labels)
    assert all(math.isfinite(figure) for figure in dataclasses.astuple(found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_do_not_depend_on_how_the_logits_are_stored(dtype: torch.dtype) -> None:
    logits_NC, labels_N = a_batch()
    stored_NC = logits_NC.to(dtype)
    assert evaluate.scores(stored_NC, labels_N) == evaluate.scores(stored_NC.double(), labels_N)


def test_log_probs_score_as_the_logits_they_come_from() -> None:
    logits_NC, labels_N = a_batch()
    of_logits = evaluate.scores(logits_NC.double(), labels_N)
    of_log_probs = evaluate.scores(logits_NC.double().log_softmax(1), labels_N)
    assert dataclasses.astuple(of_log_probs) == pytest.approx(dataclasses.astuple(of_logits))


def test_log_probs_of_an_impossible_class_are_allowed() -> None:
    log_probs_NC = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    right = evaluate.scores(log_probs_NC, torch.tensor([0, 1]))
    assert (right.accuracy, right.nll, right.ece) == (1.0, 0.0, 0.0)
    assert evaluate.scores(log_probs_NC, torch.tensor([1, 0])).nll == math.inf


def test_among_equal_logits_the_lowest_class_is_predicted() -> None:
    logits_NC = torch.zeros(3, 4)
    labels_N = torch.tensor([0, 1, 0])
    assert evaluate.correct(logits_NC, labels_N).tolist() == [True, False, True]
    assert evaluate.scores(logits_NC, labels_N).nll == pytest.approx(math.log(4))


def test_logits_that_differ_by_less_than_their_softmax_can_show_are_still_told_apart() -> None:
    logits_NC = torch.tensor([[1e-30, 2e-30]])
    assert evaluate.scores(logits_NC, torch.tensor([1])).accuracy == 1.0


def test_the_worst_class_is_one_that_has_samples() -> None:
    logits_NC = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [0, 0, 9.0], [9.0, 0, 0]])
    found = evaluate.scores(logits_NC, torch.tensor([0, 0, 2, 2]))
    assert found.worst_class_accuracy == 0.5


def test_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    logits_NC = torch.log(torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    (only,) = evaluate.reliability(logits_NC, torch.tensor([0]), bins=4)
    assert (only.lower, only.upper, only.count, only.accuracy) == (0.5, 0.75, 1, 1.0)
    assert only.confidence == pytest.approx(0.75)


def test_a_diagram_holds_every_sample_once_and_no_empty_bin() -> None:
    logits_NC, labels_N = a_batch()
    bins = evaluate.reliability(logits_NC, labels_N, bins=10)
    assert sum(b.count for b in bins) == len(labels_N)
    assert all(b.count and b.lower < b.confidence <= b.upper for b in bins)
    assert [b.lower for b in bins] == sorted(b.lower for b in bins)


def test_a_calibrated_classifier_has_a_small_calibration_error_and_an_overconfident_one_not() -> (
    None
):
    made = torch.Generator().manual_seed(0)
    logits_NC = torch.randn(20_000, 5, generator=made)
    labels_N = logits_NC.softmax(1).multinomial(1, generator=made)[:, 0]
    assert evaluate.scores(logits_NC, labels_N).ece < 0.015
    assert evaluate.scores(logits_NC * 4, labels_N).ece > 0.2


def test_agreement_is_the_share_of_equal_predictions() -> None:
    a_NC = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0], [0, 1.0]])
    b_NC = torch.tensor([[5.0, 4], [5.0, 4], [9.0, 0], [0, 0.1]])
    assert evaluate.agreement(a_NC, b_NC) == 0.75
    assert evaluate.agreement(a_NC, a_NC * 1e3) == 1.0


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float64])
def test_paired_differences_equal_the_plain_loop(kind: torch.dtype) -> None:
    made = torch.Generator().manual_seed(0)
    a_N = torch.rand(50, generator=made).round().to(kind)
    b_N = torch.rand(50, generator=made).round().to(kind)
    expected = reference.paired_difference(a_N.double().tolist(), b_N.double().tolist())
    assert evaluate.paired_difference(a_N, b_N) == pytest.approx(expected)


def test_one_pair_shows_nothing() -> None:
    one, zero = torch.tensor([True]), torch.tensor([False])
    assert evaluate.paired_difference(one, zero) == (1.0, math.inf)


def test_discordant_samples_are_counted_as_by_the_plain_loop() -> None:
    made = torch.Generator().manual_seed(0)
    for share in torch.rand(50, 2, 1, generator=made):
        a_N, b_N = torch.rand(2, 40, generator=made) < share
        pairs = list(zip(a_N.tolist(), b_N.tolist(), strict=True))
        expected = pairs.count((True, False)), pairs.count((False, True))
        assert evaluate.discordant(a_N, b_N) == expected


@pytest.mark.parametrize(
    ("gained", "lost"), [(0, 0), (1, 0), (0, 1), (5, 0), (4, 4), (30, 12), (12, 30), (900, 700)]
)
def test_mcnemars_test_is_the_exact_one_sided_binomial(gained: int, lost: int) -> None:
    from scipy.stats import binomtest

    tossed = gained + lost
    expected = binomtest(gained, tossed, alternative="greater").pvalue if tossed else 1.0
    assert evaluate.mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("logits_NC", "labels_N"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.tensor([0])),
        (torch.zeros(2), torch.tensor([0, 0])),
        (torch.zeros(2, 3), torch.tensor([0, 3])),
        (torch.zeros(2, 3), torch.tensor([0, -1])),  # -1 marks an unlabelled image
    ],
)
def test_labels_that_do_not_fit_are_refused(logits_NC: Tensor, labels_N: Tensor) -> None:
    for function in (evaluate.scores, evaluate.confusion, evaluate.reliability):
        with pytest.raises(ValueError, match="labels"):
            function(logits_NC, labels_N)


def test_comparisons_of_nothing_and_of_unlike_things_are_refused() -> None:
    with pytest.raises(ValueError, match="agreement"):
        evaluate.agreement(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="agreement"):
        evaluate.agreement(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="pairs"):
        evaluate.paired_difference(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="pairs"):
        evaluate.paired_difference(torch.zeros(0), torch.zeros(0))


class Pictures:
    """What predict needs of kd.data.Images."""

    at_once = 512

    def __init__(self, num_images: int) -> None:
        made = torch.Generator().manual_seed(0)
        self.images_NCHW = torch.randn(num_images, 1, 4, 4, generator=made)
        self.sizes: list[int] = []

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def batch(self, indices_B: Tensor, views_B: None) -> Tensor:
        assert views_B is None
        self.sizes.append(len(indices_B))
        return self.images_NCHW[indices_B]


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(1), nn.Dropout(0.5), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3)
    )


def test_predict_gives_the_eval_mode_logits_of_all_images_in_order() -> None:
    model, pictures = a_model(), Pictures(10)
    logits_NC = evaluate.predict(model, pictures, batch_size=4)
    assert pictures.sizes == [4, 4, 2]
    assert torch.allclose(logits_NC, model.eval()(pictures.images_NCHW), atol=1e-6)
    assert not logits_NC.requires_grad
    assert not logits_NC.is_inference()


def test_predict_leaves_each_module_in_its_mode_and_its_buffers_untouched() -> None:
    model = a_model().train()
    model[2].eval()  # a frozen batch norm inside a network that trains
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate.predict(model, Pictures(5))
    assert [m.training for m in model] == [True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_predict_restores_the_mode_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(99, 3)).train()
    with pytest.raises(RuntimeError):
        evaluate.predict(model, Pictures(2))
    assert model.training
    assert model[0].training


def test_predict_gives_float32_from_a_half_precision_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate.predict(model, Pictures(2)).dtype == torch.float32


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


class Crowded(nn.Module):
    """Has room for so many images at once."""

    def __init__(self, room: int, error: RuntimeError = OUT_OF_MEMORY) -> None:
        super().__init__()
        self.room, self.error = room, error

    def forward(self, images_B: Tensor) -> Tensor:
        if len(images_B) > self.room:
            raise self.error
        return images_B.flatten(1)


def test_predict_takes_fewer_images_at_once_where_memory_does_not_suffice() -> None:
    pictures = Pictures(10)
    logits_NC = evaluate.predict(Crowded(room=1), pictures, batch_size=8)
    assert pictures.sizes == [8, 4, 2, *[1] * 10]
    assert torch.equal(logits_NC, pictures.images_NCHW.flatten(1))
    with pytest.raises(torch.OutOfMemoryError):
        evaluate.predict(Crowded(room=0), pictures, batch_size=8)


def test_predict_does_not_take_another_error_for_a_lack_of_memory() -> None:
    pictures, broken = Pictures(10), Crowded(room=3, error=RuntimeError("no kernel image"))
    with pytest.raises(RuntimeError, match="no kernel image"):
        evaluate.predict(broken, pictures, batch_size=8)
    assert pictures.sizes == [8]


def test_holm_allows_for_all_rows_together():
    """0.01 * 5, 0.02 * 4, then no less than the one before, and no more than 1."""
    given = {"a": 0.02, "b": 0.01, "c": 0.025, "d": 0.6, "e": 0.9}
    wanted = {"b": 0.05, "a": 0.08, "c": 0.08, "d": 1.0, "e": 1.0}
    assert evaluate.holm(given) == pytest.approx(wanted)
