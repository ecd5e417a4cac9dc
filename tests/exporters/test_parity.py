"""export_and_check publishes what it has verified, and nothing else."""

import hashlib
import math
import re
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd.bundle.checksums import passing
from kd.component import ConfigError
from kd.disk import digest
from kd.exporters import ExportRefused, Parity, Runner, Tolerance, Trained, export_and_check
from kd.exporters.format import HELD_TO

PROJECT = Path(__file__).parents[2]

PICTURES_NHWC = torch.randint(
    0, 256, (40, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
LABELS_N = torch.zeros(40, dtype=torch.int64)


def a_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def trained(module: nn.Module) -> Trained:
    return Trained(
        module=module, image_size=8, class_names=tuple("abcde"), mean=(0.5,), std=(0.25,)
    )


@dataclass(frozen=True)
class Weights:
    """A format of one's own, quick to make: the weights of `a_module`, and its code as runtime.

    With an `offset` it is a broken format: the first class's bias comes out wrong by that much.
    """

    offset: float = 0.0
    tolerance: Tolerance = Tolerance()  # noqa: RUF009 - frozen
    precision: str = "fp32"
    kind = "weights"
    picture_input = False
    int8 = None
    runs_here = True
    suffix = ".safetensors"

    def check(self) -> None:
        pass

    def export(self, trained: Trained, path: Path) -> None:
        state = {name: value.clone() for name, value in trained.module.state_dict().items()}
        state["3.bias"][0] += self.offset
        save_file(state, path)

    def load(self, path: Path, threads: int = 1) -> Runner:
        module = a_module()
        module.load_state_dict(load_file(path))
        return Runner(module, (1, 8, 8), any_batch=True, threads=threads)

    def inspect(self, path: Path) -> dict[str, Any]:
        return {"tensors": sorted(load_file(path))}


def check(exporter, folder: Path, module: nn.Module | None = None, labels=LABELS_N, **others):
    given = trained(module or a_module())
    return export_and_check(exporter, given, PICTURES_NHWC, labels, folder, **others)


@pytest.mark.parametrize("offset", [2e-4, -0.5, math.nan, math.inf])
def test_a_file_that_computes_something_else_is_refused_with_the_figures(
    offset: float, tmp_path: Path
) -> None:
    with pytest.raises(ExportRefused, match=r"on 40 validation .* agreement.*eager.*tolerance"):
        check(Weights(offset), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_is_made_beside_its_place_under_a_name_that_a_bundle_passes_over(
    tmp_path: Path,
) -> None:
    """Another disk's could not be renamed, and a crash may leave it behind."""
    folder, seen = tmp_path / "not/yet", []

    class Noting(Weights):
        def export(self, trained: Trained, path: Path) -> None:
            seen.append(path.relative_to(folder).parts[0])
            super().export(trained, path)

    check(Noting(tolerance=Tolerance(top1_agreement=1.0)), folder)  # all of them
    assert [passing(each) for each in seen] == [True]


def test_a_refused_file_takes_its_predecessor_with_it(tmp_path: Path) -> None:
    check(Weights(), tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    with pytest.raises(ExportRefused):
        check(Weights(1.0), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_tolerance_is_what_decides(tmp_path: Path) -> None:
    loose = Weights(0.01, Tolerance(relative=0.02, top1_agreement=0.0))
    parity = check(loose, tmp_path)
    assert parity.max_abs == pytest.approx(0.01, rel=1e-3)
    assert parity.mean_abs == pytest.approx(0.01 / 5, rel=1e-3)  # one class of five
    with pytest.raises(ExportRefused):
        check(Weights(0.01, Tolerance(relative=0.005, top1_agreement=0.0)), tmp_path)


def test_agreement_alone_can_refuse(tmp_path: Path) -> None:
    with pytest.raises(
        ExportRefused, match=r"agreement is 0\.\d+.*top1_agreement may be at least 0\.999"
    ):
        check(Weights(5.0, Tolerance(relative=1e3)), tmp_path)


def test_the_difference_is_seen_on_the_scale_of_the_logits(tmp_path: Path) -> None:
    large = a_module()
    with torch.no_grad():
        large[3].bias -= 1e3
    parity = check(Weights(2e-3), tmp_path, module=large)
    assert parity.max_abs > 1e-3
    assert parity.eager_max_abs_logit > 100


def test_a_network_that_is_itself_not_finite_is_refused(tmp_path: Path) -> None:
    module = a_module()
    with torch.no_grad():
        module[3].weight.fill_(math.nan)
    with pytest.raises(ExportRefused, match="nan"):
        check(Weights(), tmp_path, module=module)


def test_the_very_last_image_is_compared(tmp_path: Path) -> None:
    last_CHW = trained(a_module()).normalise(PICTURES_NHWC)[-1]

    class Trap(nn.Sequential):
        """Differs from its export for the last image alone."""

        def forward(self, images_BCHW: Tensor) -> Tensor:
            last_B = (images_BCHW == last_CHW).all((1, 2, 3))
            return super().forward(images_BCHW) + last_B[:, None]

    with pytest.raises(ExportRefused):
        check(Weights(), tmp_path, module=Trap(*a_module()))


def test_labels_of_another_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="39 labels for 40 pictures"):
        check(Weights(), tmp_path, labels=LABELS_N[:39])
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Failing(Weights):
        def export(self, trained: Trained, path: Path) -> None:
            path.write_bytes(b"half a fi")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        check(Failing(0.0), tmp_path)
    assert not list(tmp_path.iterdir())


def test_each_precision_is_held_to_limits_of_its_own(tmp_path: Path) -> None:
    parity = check(Weights(0.01, precision="int8"), tmp_path)
    assert parity.max_abs > 1e-4
    with pytest.raises(ExportRefused, match="sqnr_db"):
        check(Weights(0.01, Tolerance(sqnr_db=90.0), "int8"), tmp_path)


def test_noise_is_measured_in_decibels(tmp_path: Path) -> None:
    with torch.inference_mode():
        module = trained(a_module())
        logits_NC = module.module(module.normalise(PICTURES_NHWC)).double()
    expected = 10 * math.log10(logits_NC.square().sum().item() / (40 * 0.01**2))
    assert check(Weights(0.01, precision="int8"), tmp_path).sqnr_db == pytest.approx(
        expected, 1e-4
    )


def test_without_any_noise_there_are_no_decibels(tmp_path: Path) -> None:
    zero = a_module()
    with torch.no_grad():
        zero[3].weight.zero_()  # so that no sum depends on the batch size
    exporter = Weights(tolerance=Tolerance(sqnr_db=90.0))
    record = check(exporter, tmp_path, module=zero).record()
    assert record["max_abs"] == 0
    assert record["sqnr_db"] is None


def test_lost_accuracy_alone_can_refuse(tmp_path: Path) -> None:
    with torch.inference_mode():
        module = trained(a_module())
        top1_N = module.module(module.normalise(PICTURES_NHWC)).argmax(1)
    agreeing = Tolerance(top1_agreement=0.0, sqnr_db=-99.0)
    offset = Weights(0.2, agreeing, "int8")  # one class is named too often
    with pytest.raises(
        ExportRefused, match=r"accuracy_points may be at most 1 .*calibration_images"
    ):
        check(offset, tmp_path, labels=top1_N)
    allowed = replace(agreeing, accuracy_points=100.0)
    parity = check(replace(offset, tolerance=allowed), tmp_path, labels=top1_N)
    assert parity.lost_points == pytest.approx(100 * (1 - parity.top1_agreement))
    assert parity.lost_points > 1


def test_one_picture_of_few_may_be_lost_unless_none_may(tmp_path: Path) -> None:
    with torch.inference_mode():
        module = trained(a_module())
        logits_NC = module.module(module.normalise(PICTURES_NHWC))
    others_N = logits_NC[:, 1:].amax(1) - logits_NC[:, 0]
    nearest, second = others_N[others_N > 0].sort().values[:2]
    anything = Tolerance(top1_agreement=0.0, sqnr_db=-99.0)
    one = Weights(((nearest + second) / 2).item(), anything, "int8")  # changes one class
    labels_N = logits_NC.argmax(1)
    assert check(one, tmp_path, labels=labels_N).lost_points == pytest.approx(2.5)
    none = replace(one, tolerance=replace(anything, accuracy_points=0.0))
    with pytest.raises(ExportRefused, match=r"at most 0 \(one picture is 2\.50 points\)"):
        check(none, tmp_path, labels=labels_N)


class Tuner:
    """Returns a network, and notes the figures that it was asked with."""

    def __init__(self, tuned: Trained | None) -> None:
        self.tuned = tuned
        self.asked: list[Parity] = []

    def __call__(self, parity: Parity) -> Trained | None:
        self.asked.append(parity)
        return self.tuned


def test_the_better_of_two_files_is_kept_and_both_figures_are_recorded(tmp_path: Path) -> None:
    with torch.inference_mode():
        module = trained(a_module())
        top1_N = module.module(module.normalise(PICTURES_NHWC)).argmax(1)
    correcting = a_module()
    with torch.no_grad():
        correcting[3].bias[0] -= 0.2  # what the format adds
    loose = Tolerance(top1_agreement=0.0, accuracy_points=100.0, sqnr_db=-99.0)
    exporter = Weights(0.2, loose, "int8")
    tuner = Tuner(trained(correcting))
    parity = check(exporter, tmp_path, labels=top1_N, fine_tune=tuner)
    (first,) = tuner.asked
    assert first.val_accuracy < 1
    assert parity.val_accuracy == 1
    assert parity.record()["chosen"] == "qat"
    assert parity.record()["ptq_val_accuracy"] == first.val_accuracy
    assert parity.record()["qat_val_accuracy"] == 1
    assert parity.record()["tensors"] == sorted(correcting.state_dict())
    assert parity.max_abs < 1e-5  # compared with the network that was asked for
    bias = load_file(tmp_path / "model.safetensors")["3.bias"]
    torch.testing.assert_close(bias, a_module()[3].bias.detach())
    equal = a_module()
    with torch.no_grad():
        equal[3].bias += 1
    asked = Tuner(trained(equal))
    again = check(Weights(0.0, loose, "int8"), tmp_path, labels=top1_N, fine_tune=asked)
    assert again.record()["chosen"] == "ptq"  # neither is better: the untouched one stays
    assert again.max_abs < 1e-5
    assert "chosen" not in check(exporter, tmp_path, fine_tune=Tuner(None)).record()


def test_a_file_refused_after_fine_tuning_is_not_told_to_fine_tune(tmp_path: Path) -> None:
    with torch.inference_mode():
        module = trained(a_module())
        top1_N = module.module(module.normalise(PICTURES_NHWC)).argmax(1)
    exporter = Weights(0.2, Tolerance(top1_agreement=0.0, sqnr_db=-99.0), "int8")
    with pytest.raises(ExportRefused, match="qat_when_loss_above") as untuned:
        check(exporter, tmp_path, labels=top1_N)
    assert "qat_epochs" not in str(untuned.value)
    tuner = Tuner(trained(a_module()))
    both = r"accuracy is (0\.\d{4}) with .* int8 \1: .*qat_epochs: \.\.\., qat_lr: .*tolerance"
    with pytest.raises(ExportRefused, match=both) as tuned:
        check(exporter, tmp_path, labels=top1_N, fine_tune=tuner)
    assert "qat_when_loss_above" not in str(tuned.value)


def test_the_page_names_the_limits_that_files_are_held_to() -> None:
    page = (PROJECT / "docs/exports.md").read_text()
    rows = re.findall(r"^\| `(\w+)`: .*, at \w+ \| (.*) \| (.*) \| (.*) \|$", page, re.M)
    written = {
        precision: {name: float(said[k]) for name, *said in rows if said[k] != "-"}
        for k, precision in enumerate(("fp32", "fp16", "int8"))
    }
    assert written == HELD_TO


@pytest.mark.parametrize(
    "wrong",
    [
        {"relative": -1.0},
        {"top1_agreement": 1.1},
        {"accuracy_points": -1.0},
        {"sqnr_db": math.nan},
    ],
)
def test_a_tolerance_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Tolerance(**wrong)
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Tolerance(**{name: math.nan for name in wrong})
    Tolerance(relative=0.0, top1_agreement=1.0, accuracy_points=0.0)  # the ends are in range


def test_a_files_checksum_does_not_take_the_memory_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(2**25)  # a hole of 32 MiB
    tracemalloc.start()
    try:
        found = digest(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == hashlib.sha256(bytes(2**25)).hexdigest()
    assert peak < 2**20
