"""export_and_check publishes what it has verified, and nothing else."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd.component import ConfigError
from kd.exporters import ExportRefused, Runner, Tolerance, export_and_check

IMAGES_NCHW = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS_N = torch.zeros(40, dtype=torch.int64)


def a_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


@dataclass(frozen=True)
class Weights:
    """A format of one's own, quick to make: the weights of `a_module`, and its code as runtime.

    With an `offset` it is a broken format: the first class's bias comes out wrong by that much.
    """

    offset: float = 0.0
    tolerance: Tolerance = Tolerance()  # noqa: RUF009 - frozen
    suffix = ".safetensors"

    def export(self, module: nn.Module, example_BCHW: Tensor, path: Path) -> None:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        state["3.bias"][0] += self.offset
        save_file(state, path)

    def load(self, path: Path, threads: int = 1) -> Runner:
        module = a_module()
        module.load_state_dict(load_file(path))
        return Runner(module, (1, 8, 8), any_batch=True, threads=threads)

    def inspect(self, path: Path) -> dict[str, Any]:
        return {"tensors": sorted(load_file(path))}


def check(exporter, folder: Path, module: nn.Module | None = None, batches=None, labels=LABELS_N):
    batches = torch.split(IMAGES_NCHW, 16) if batches is None else batches
    return export_and_check(exporter, module or a_module(), IMAGES_NCHW, batches, labels, folder)


@pytest.mark.parametrize("offset", [2e-4, -0.5, math.nan, math.inf])
def test_a_file_that_computes_something_else_is_refused_with_the_figures(
    offset: float, tmp_path: Path
) -> None:
    with pytest.raises(ExportRefused, match=r"on 40 validation .* allowed.*agreement.*eager"):
        check(Weights(offset), tmp_path)
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(ExportRefused, match=r"agreement is 0\.\d+ \(0\.999 needed\)"):
        check(Weights(5.0, Tolerance(relative=1e3)), tmp_path)


def test_the_difference_is_seen_on_the_scale_of_the_logits(tmp_path: Path) -> None:
    large = a_module()
    with torch.no_grad():
        large[3].weight *= 1e3
    parity = check(Weights(2e-3), tmp_path, module=large)
    assert parity.max_abs > 1e-3
    assert parity.eager_max_abs_logit > 100


def test_a_network_that_is_itself_not_finite_is_refused(tmp_path: Path) -> None:
    module = a_module()
    with torch.no_grad():
        module[3].weight.fill_(math.nan)
    with pytest.raises(ExportRefused, match="nan"):
        check(Weights(), tmp_path, module=module)


def test_all_images_are_compared_in_one_pass_over_a_generator(tmp_path: Path) -> None:
    class Trap(nn.Sequential):
        """Differs from its export for the very last image alone."""

        def forward(self, images_BCHW: Tensor) -> Tensor:
            last_B = images_BCHW.sum((1, 2, 3)) == IMAGES_NCHW[-1].sum()
            return super().forward(images_BCHW) + last_B[:, None]

    def batches() -> Iterator[Tensor]:
        yield from torch.split(IMAGES_NCHW, 1)

    with pytest.raises(ExportRefused):
        check(Weights(), tmp_path, module=Trap(*a_module()), batches=batches())


def test_labels_of_another_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="39 labels for 40 images"):
        check(Weights(), tmp_path, labels=LABELS_N[:39])
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Failing(Weights):
        def export(self, module: nn.Module, example_BCHW: Tensor, path: Path) -> None:
            path.write_bytes(b"half a fi")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        check(Failing(0.0), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"relative": -1.0}, {"top1_agreement": 1.1}])
def test_a_tolerance_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Tolerance(**wrong)
    with pytest.raises(ConfigError):
        Tolerance(**{name: math.nan for name in wrong})
