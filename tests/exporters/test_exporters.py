"""The battery of tests/checks_exporters.py: every format with networks of every make."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from kd.component import ConfigError
from kd.exporters import ExecuTorch, Exporter, Onnx, Tolerance
from kd.models import CifarResNet, PlainCNN, build_model
from tests.checks_exporters import CHECKS, Exported, check_exporter, exported, settled

EXPORTERS = [*(kind() for kind in get_args(Exporter)), Onnx(dynamic_batch=True)]


class ZeroPadded(nn.Module):
    """He et al.'s option A: where channels double, the shortcut skips pixels and pads zeros.

    With maximum pooling, dropout, and a batch norm that no convolution directly precedes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.classes = nn.Linear(16, 10)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        hidden = self.norm(self.pool(F.relu(self.conv1(images_BCHW))))
        shortcut = F.pad(hidden[:, :, ::2, ::2], (0, 0, 0, 0, 0, 8))
        hidden = F.relu(self.conv2(hidden) + shortcut)
        return self.classes(self.dropout(hidden.mean((2, 3))))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "option_a": ZeroPadded,
    "plain_2": lambda: build_model(PlainCNN(depth=2), channels=1, image_size=16, num_classes=10),
    "resnet_8": lambda: build_model(
        CifarResNet(depth=8), channels=1, image_size=16, num_classes=10
    ),
}


def images(num: int, channels: int, size: int) -> Tensor:
    return torch.randn(num, channels, size, size, generator=torch.Generator().manual_seed(0))


def cases() -> Iterator[Any]:
    """Formats times networks; the network that the demo itself exports is left to the slow run."""
    for exporter, name in itertools.product(EXPORTERS, MODULES):
        dynamic = getattr(exporter, "dynamic_batch", False)
        slow = name == "plain_2" or (dynamic and name != "option_a")
        yield pytest.param(
            (exporter, name),
            id=f"{exporter.kind}{'_dynamic' * dynamic}-{name}",
            marks=[pytest.mark.slow] * slow,
        )


@pytest.fixture(scope="module", params=cases())
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    exporter, name = request.param
    torch.manual_seed(0)
    images_NCHW = images(32, 1, 16)
    module = settled(MODULES[name](), images_NCHW)
    return exported(exporter, module, images_NCHW, tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_exporter(made: Exported, check: Callable[[Exported], None]) -> None:
    check(made)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("exporter", EXPORTERS, ids=lambda exporter: str(exporter)[:30])
def test_torchvision_networks_at_224(exporter: Exporter, name: str, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    images_NCHW = images(8, 3, 224)
    module = settled(models.get_model(name, num_classes=10), images_NCHW)
    check_exporter(exporter, module, images_NCHW, tmp_path)


def test_xnnpack_takes_the_whole_of_the_house_s_networks(made: Exported) -> None:
    if isinstance(made.exporter, ExecuTorch) and not isinstance(made.module, ZeroPadded):
        contents = made.exporter.inspect(made.path)
        assert contents["delegates"] == {"XnnpackBackend": 1}
        assert contents["undelegated"] == {}


def test_operators_that_xnnpack_cannot_take_are_counted(tmp_path: Path) -> None:
    class Sine(nn.Module):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            return images_BCHW.sin().cumsum(1).sin().mean((2, 3))

    ExecuTorch().export(Sine(), images(1, 2, 4), tmp_path / "sine.pte")
    undelegated = ExecuTorch().inspect(tmp_path / "sine.pte")["undelegated"]
    assert undelegated["aten::cumsum.out"] == 1
    assert "executorch_call" not in undelegated


def test_onnx_batch_is_fixed_unless_asked_otherwise(made: Exported) -> None:
    if isinstance(made.exporter, Onnx):
        (batch, *_) = made.exporter.inspect(made.path)["inputs"]["images"]
        assert batch == ("batch" if made.exporter.dynamic_batch else 1)
        assert made.load().any_batch == made.exporter.dynamic_batch


def test_exports_say_nothing_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for exporter in EXPORTERS[:2]:
        path = tmp_path / f"model{exporter.suffix}"
        exporter.export(ZeroPadded(), images(1, 1, 16), path)
        exporter.load(path)(images(2, 1, 16))
        exporter.inspect(path)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("exporter", "package"), [(ExecuTorch(), "executorch"), (Onnx(), "onnxscript")]
)
def test_a_missing_package_is_named(
    exporter: Exporter, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"{package}.*pip install"):
        exporter.export(ZeroPadded(), images(1, 1, 16), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_union_is_the_registry_that_params_read() -> None:
    read = TypeAdapter(Exporter).validate_python
    assert read({"kind": "executorch"}) == ExecuTorch()
    asked = {"kind": "onnx", "dynamic_batch": True, "tolerance": {"top1_agreement": 1.0}}
    assert read(asked) == Onnx(dynamic_batch=True, tolerance=Tolerance(top1_agreement=1.0))
    with pytest.raises(ValidationError):
        read({"kind": "onnx", "opset": 3})


IN_ANOTHER_PROCESS = """
import sys, torch
from pathlib import Path
from kd.exporters import ExecuTorch, Onnx
from kd.models import CifarResNet, build_model
torch.manual_seed(0)
module = build_model(CifarResNet(depth=8), channels=1, image_size=16, num_classes=10)
for exporter in (ExecuTorch(), Onnx()):
    exporter.export(module, torch.zeros(1, 1, 16, 16), Path(sys.argv[1] + exporter.suffix))
"""


@pytest.mark.slow
def test_another_process_with_other_hashes_writes_the_same_bytes(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path.cwd())},
            check=True,
        )
    for suffix in (".pte", ".onnx"):
        one, two = (tmp_path / f"{seed}{suffix}" for seed in ("1", "2"))
        assert one.read_bytes() == two.read_bytes()


def test_the_package_needs_torch_alone() -> None:
    blocked = "executorch onnx onnxruntime onnxscript numpy torchvision"
    code = (
        f"import sys; import torch; "
        f"sys.modules.update({{n: None for n in {blocked.split()!r} if n not in sys.modules}}); "
        f"import kd.exporters, kd.evaluate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
