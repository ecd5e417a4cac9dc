"""The battery of tests/checks_exporters.py: every format with networks of every make."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from kd.component import ConfigError
from kd.disk import digest
from kd.exporters import CoreML, ExecuTorch, Exporter, Int8, LiteRT, Onnx, Tolerance
from kd.models import CifarResNet, PlainCNN, build_model
from tests.checks_exporters import (
    CHECKS,
    LOOSE,
    Exported,
    check_exporter,
    exported,
    need,
    trained_on,
)


def exporters() -> Iterator[tuple[str, Any]]:
    """Every member of the union in every precision; those that round take pictures."""
    for kind in get_args(Exporter):
        for precision in get_args(get_type_hints(kind)["precision"]):
            exact = precision == "fp32"
            tolerance = Tolerance() if exact else LOOSE
            given = {"precision": precision, "picture_input": not exact, "tolerance": tolerance}
            yield f"{kind.kind}_{precision}", kind(**given)
    yield "onnx_dynamic", Onnx(dynamic_batch=True, picture_input=True)


EXPORTERS = dict(exporters())


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


def pictures(num: int, channels: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (num, size, size, channels), dtype=torch.uint8, generator=generator
    )


FAST = {
    ("executorch_fp32", "option_a"),
    ("executorch_fp32", "resnet_8"),
    ("executorch_int8", "plain_2"),
    ("coreml_fp16", "option_a"),
    ("coreml_int8", "plain_2"),
    ("onnx_fp32", "option_a"),
    ("onnx_fp32", "resnet_8"),
    ("onnx_int8", "plain_2"),
    ("onnx_int8", "resnet_8"),
    ("onnx_dynamic", "option_a"),
}


def cases() -> Iterator[Any]:
    """Formats times networks; most are left to the slow run."""
    for format_name in EXPORTERS:
        for name in MODULES:
            slow = (format_name, name) not in FAST
            marks = [pytest.mark.slow] * slow
            yield pytest.param((format_name, name), id=f"{format_name}-{name}", marks=marks)


@pytest.fixture(scope="module", params=cases())
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    format_name, name = request.param
    torch.manual_seed(0)
    pictures_NHWC = pictures(32, 1, 16)
    trained = trained_on(MODULES[name](), pictures_NHWC)
    return exported(EXPORTERS[format_name], trained, pictures_NHWC, tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_exporter(made: Exported, check: Callable[[Exported], None]) -> None:
    check(made)


@cache
def learned(name: str) -> tuple[nn.Module, Tensor]:
    """A torchvision network that has learned to tell eight pictures of large squares apart.

    An untrained one sees next to no difference between pictures at 224 pixels.  Made to tell them
    apart by large weights at its end, it is not what anybody exports: its classes lie so close
    together that fp16's rounding moved probabilities by 0.08, and int8's by 0.4.
    """
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    module = models.get_model(name, num_classes=10)
    pictures_NHWC = pictures(8, 3, 7).repeat_interleave(32, 1).repeat_interleave(32, 2)
    images_NCHW = (pictures_NHWC / 128 - 1).permute(0, 3, 1, 2)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(module(images_NCHW), torch.arange(8)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return module, pictures_NHWC


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("format_name", EXPORTERS)
def test_torchvision_networks_at_224(format_name: str, name: str, tmp_path: Path) -> None:
    check_exporter(EXPORTERS[format_name], *learned(name), tmp_path)


def test_xnnpack_takes_the_whole_of_the_house_s_networks(made: Exported) -> None:
    if isinstance(made.exporter, ExecuTorch) and not isinstance(made.trained.module, ZeroPadded):
        contents = made.exporter.inspect(made.path)
        assert contents["delegates"] == {"XnnpackBackend": 1}
        cast = {"dim_order_ops::_to_dim_order_copy.out": 1}  # of the picture to float
        assert contents["undelegated"] == (cast if made.exporter.picture_input else {})


def test_operators_that_xnnpack_cannot_take_are_counted(tmp_path: Path) -> None:
    class Sine(nn.Module):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            return images_BCHW.sin().cumsum(1).sin().mean((2, 3)).repeat(1, 10)

    ExecuTorch().export(trained_on(Sine(), pictures(4, 1, 4)), tmp_path / "sine.pte")
    undelegated = ExecuTorch().inspect(tmp_path / "sine.pte")["undelegated"]
    assert undelegated["aten::cumsum.out"] == 1
    assert "executorch_call" not in undelegated


def test_only_a_change_of_threads_touches_executorch_s_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = trained_on(ZeroPadded(), pictures(4, 1, 16))
    ExecuTorch().export(trained, tmp_path / "model.pte")
    one, two = (ExecuTorch().load(tmp_path / "model.pte", threads) for threads in (1, 2))
    from executorch.extension.pybindings import portable_lib  # its first import would warn

    touched: list[str] = []
    for module, name in [
        (os, "dup2"),  # of standard error, where the pool says what it finds
        (portable_lib, "_threadpool_get_thread_count"),
        (portable_lib, "_unsafe_reset_threadpool"),
    ]:
        call = getattr(module, name)

        def noted(*given: Any, name: str = name, call: Callable[..., Any] = call) -> Any:
            touched.append(name)
            return call(*given)

        monkeypatch.setattr(module, name, noted)
    image = one.blank(1)
    expected = two(image)
    assert touched == []
    torch.testing.assert_close(one(image), expected)
    assert touched.count("_unsafe_reset_threadpool") == 1
    touched.clear()
    assert torch.equal(one(image), one(image))
    assert touched == []


def test_onnx_batch_is_fixed_unless_asked_otherwise(made: Exported) -> None:
    if isinstance(made.exporter, Onnx):
        (batch, *_) = made.exporter.inspect(made.path)["inputs"]["image"]
        assert batch == ("batch" if made.exporter.dynamic_batch else 1)
        assert made.load().any_batch == made.exporter.dynamic_batch


def test_int8_onnx_computes_in_int8_but_for_preprocessing_and_softmax(made: Exported) -> None:
    if made.exporter.kind == "onnx" and made.exporter.precision == "int8":
        import onnx

        graph = onnx.load(made.path).graph
        makers = {name: node for node in graph.node for name in node.output}
        for node in graph.node:
            sources = [makers[name].op_type for name in node.input if name in makers]
            if node.op_type in ("Conv", "Gemm"):
                assert sources
                assert set(sources) == {"DequantizeLinear"}
            if node.op_type in ("Cast", "Sub", "Mul"):
                assert "DequantizeLinear" not in sources
        weights = [each for each in graph.initializer if len(each.dims) == 4]
        assert weights
        assert {each.data_type for each in weights} == {onnx.TensorProto.INT8}
        assert set(made.exporter.inspect(made.path)["opset"]) == {"ai.onnx"}


def test_exports_say_nothing_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained = trained_on(ZeroPadded(), pictures(4, 1, 16))
    capfd.readouterr()
    for exporter in (ExecuTorch(), Onnx(precision="int8"), CoreML()):
        path = tmp_path / f"model{exporter.suffix}"
        exporter.export(trained, path)
        exporter.load(path)(exporter.load(path).blank(2))
        exporter.inspect(path)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("format_name", EXPORTERS)
def test_a_missing_package_is_named_before_anything_is_made(
    format_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {
        "executorch": "torchao",
        "onnx": "onnxscript",
        "coreml": "coremltools",
        "litert": "ai_edge_litert",
    }
    exporter = EXPORTERS[format_name]
    monkeypatch.setitem(sys.modules, needed[exporter.kind], None)
    with pytest.raises(ConfigError, match=f"{needed[exporter.kind]}.*pip install"):
        exporter.check()
    with pytest.raises(ConfigError, match=f"{needed[exporter.kind]}.*pip install"):
        exporter.export(trained_on(ZeroPadded(), pictures(4, 1, 16)), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_coremltools_that_was_built_without_its_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "coremltools").mkdir()
    (tmp_path / "coremltools/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "coremltools", raising=False)
    with pytest.raises(ConfigError, match="use an older Python"):
        CoreML().check()


def test_the_other_environment_that_litert_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ai_edge_litert")
    monkeypatch.setenv("KD_LITERT_PYTHON", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match=r"python is missing; run: make litert.*KD_LITERT_PYT"):
        LiteRT().check()
    monkeypatch.setenv("KD_LITERT_PYTHON", sys.executable)  # has torch, and not the converter
    with pytest.raises(ConfigError, match=r"could not run .*No module named.*make litert"):
        LiteRT().export(trained_on(ZeroPadded(), pictures(4, 1, 16)), tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def forward(self, images_BCHW: Tensor) -> Tensor:
        sums_B = images_BCHW.sum((1, 2, 3))
        return torch.zeros(1, 10) + (sums_B if sums_B.item() > 0 else -sums_B)[:, None]


class DataSized(nn.Module):
    """As many rows of features as the image has bright pixels."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        bright = images_BCHW[images_BCHW > 0]
        return bright.view(-1)[: bright.numel() // 2].mean().expand(1, 10).clone()


class Unsupported(nn.Module):
    """A Bessel function, of which no mobile format knows."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return torch.special.bessel_j0(images_BCHW).mean((2, 3)).repeat(1, 10)


@pytest.mark.parametrize(
    ("format_name", "wrong"),
    [
        ("executorch_fp32", Branching),
        ("executorch_fp32", DataSized),  # in ONNX, sizes may depend on data
        ("executorch_fp32", Unsupported),
        ("onnx_fp32", Branching),
        ("onnx_fp32", Unsupported),
        ("coreml_fp16", Branching),
        ("coreml_fp16", Unsupported),
        ("litert_fp32", Branching),
        ("litert_fp32", DataSized),
        ("litert_fp32", Unsupported),
    ],
)
def test_a_network_that_the_format_cannot_hold_is_refused_and_leaves_nothing(
    format_name: str, wrong: type[nn.Module], tmp_path: Path
) -> None:
    need(EXPORTERS[format_name])
    exporter, trained = EXPORTERS[format_name], trained_on(wrong(), pictures(1, 1, 4))
    with pytest.raises(ConfigError, match=r"the network cannot become .*same steps") as refused:
        exporter.export(trained, tmp_path / "model")
    assert "This is step" not in str(refused.value)  # torch.onnx's own steps, with no reason
    assert not list(tmp_path.iterdir())
    del refused
    gc.collect()  # coremltools' temporary folders, if it left any, warn here


@pytest.mark.parametrize(
    "wrong",
    [
        {"calibration_images": 0},
        {"qat_when_loss_above": -0.1},
        {"qat_epochs": 0},
        {"qat_lr": 0.0},
    ],
)
def test_settings_of_int8_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Int8(**wrong)


def test_the_union_is_the_registry_that_params_read() -> None:
    read = TypeAdapter(Exporter).validate_python
    assert read({"kind": "executorch"}) == ExecuTorch()
    asked = {"kind": "onnx", "dynamic_batch": True, "tolerance": {"top1_agreement": 1.0}}
    assert read(asked) == Onnx(dynamic_batch=True, tolerance=Tolerance(top1_agreement=1.0))
    int8 = {"kind": "onnx", "precision": "int8", "int8": {"calibration_images": 9}}
    assert read(int8) == Onnx(precision="int8", int8=Int8(calibration_images=9))
    for wrong in ({"opset": 3}, {"precision": "int4"}):
        with pytest.raises(ValidationError):
            read({"kind": "onnx", **wrong})


IN_ANOTHER_PROCESS = """
import sys, torch
from pathlib import Path
from tests.checks_exporters import trained_on
from tests.exporters.test_exporters import EXPORTERS, MODULES, pictures
torch.manual_seed(0)
trained = trained_on(MODULES["resnet_8"](), pictures(8, 1, 16))
for name in sys.argv[2:]:
    EXPORTERS[name].export(trained, Path(sys.argv[1]) / f"{name}{EXPORTERS[name].suffix}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("others", [False, True], ids=["here", "litert"])
def test_another_process_with_other_hashes_writes_the_same_bytes(
    others: bool, tmp_path: Path
) -> None:
    names = [name for name, each in EXPORTERS.items() if (each.kind == "litert") == others]
    need(EXPORTERS[names[0]])
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / seed), *names],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
    for name in names:
        suffix = EXPORTERS[name].suffix
        one, two = (tmp_path / seed / f"{name}{suffix}" for seed in ("1", "2"))
        assert digest(one) == digest(two), name


def test_the_package_needs_torch_alone() -> None:
    blocked = (
        "executorch torchao onnx onnxruntime onnxscript coremltools ai_edge_litert numpy "
        "torchvision"
    )
    code = (
        f"import sys; import torch; "
        f"sys.modules.update({{n: None for n in {blocked.split()!r} if n not in sys.modules}}); "
        f"import kd.exporters, kd.evaluate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
