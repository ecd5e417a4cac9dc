"""`kd bench`: figures of real files, clear words for everything else."""

import re
import time

import pytest
from torch import nn

from kd import bench
from kd.__main__ import run
from kd.component import ConfigError
from kd.exporters import Onnx, Runner, Trained
from tests.bundle.toys import bundled


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return bundled(tmp_path_factory.mktemp("bench"), Onnx(dynamic_batch=True)).folder


class Slow(nn.Module):
    def forward(self, images_BCHW):
        time.sleep(0.01 * len(images_BCHW))
        return images_BCHW.flatten(1)


def test_every_batch_and_number_of_threads_is_measured_beside_eager(exported):
    found = bench.measure(exported / "model.onnx", (1, 3), (1, 2), 0.05, eager=Slow())
    rows = {(row["batch"], row["threads"]): row for row in found["rows"]}
    assert list(rows) == [(1, 1), (3, 1), (1, 2), (3, 2)]
    for (batch, _), row in rows.items():
        assert 0 < row["median_ms"] <= row["p90_ms"]
        assert 10 * batch <= row["eager_median_ms"] <= row["eager_p90_ms"] < 1000
        assert row["n"] >= 15
    assert found["size_bytes"] == (exported / "model.onnx").stat().st_size
    assert 0 < found["own_mb"] < found["peak_mb"]


def test_the_command_prints_a_table_and_says_what_lies_beside(exported, capsys):
    assert run(["bench", str(exported / "model.onnx"), "--batch", "2", "--seconds", "0.05"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"batch +threads +median_ms +p90_ms +n\n +2 +1 +\d+\.\d{3} ", said)
    assert re.search(r"memory: \d+\.\d MB", said)
    assert "in a whole bundle: MODEL_CARD.md, classify.py, labels.txt" in said


def test_a_file_on_its_own_is_measured_too(exported, tmp_path, capsys):
    alone = tmp_path / "student.onnx"
    alone.write_bytes((exported / "model.onnx").read_bytes())
    assert bench.surroundings(alone).startswith("alone")


def test_a_file_whose_checksum_does_not_match_is_not_measured(tmp_path, capsys):
    folder = bundled(tmp_path, Onnx()).folder
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    assert run(["bench", str(path)]) == 2
    assert "model.onnx does not match SHA256SUMS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("model.onnx", b"no model", "is damaged or not an ONNX model"),
        ("model.onnx", b"", "is damaged or not an ONNX model"),
        ("model.pte", b"\xff" * 99, "is damaged or not an ExecuTorch program"),
        ("model.mlpackage", b"x", "runs only on Apple devices"),
        ("photo.jpg", b"x", r"photo\.jpg is not an exported file \(known: \.pte, \.onnx"),
        ("gone.onnx", None, r"gone\.onnx does not exist"),
    ],
)
def test_what_is_no_exported_file_is_refused_in_a_line(tmp_path, capsys, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(["bench", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(told, line)


@pytest.mark.parametrize(
    ("shape", "kind", "told"),
    [
        ([1, 3, 8, 8], "INT64", "is not an image classifier"),
        ([1, 3, "height", "width"], "FLOAT", "is not an image classifier"),
        ([1, 5], "FLOAT", "is damaged or not an ONNX model"),
    ],
)
def test_a_model_of_another_kind_is_refused_in_a_line(tmp_path, capsys, shape, kind, told):
    from onnx import TensorProto, helper, save

    ends = [
        helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape) for name in "xy"
    ]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", 20)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "other.onnx")
    assert run(["bench", str(tmp_path / "other.onnx")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert told in line


def test_a_runtime_that_says_nothing_is_quoted_by_its_error_s_name(exported, monkeypatch):
    def load(self, path, threads):
        return Runner(refuse, (3, 8, 8), True, threads)

    def refuse(images):
        raise NotImplementedError

    monkeypatch.setattr(Onnx, "load", load)
    with pytest.raises(ConfigError, match=r"image classifier \(NotImplementedError\(\)\)"):
        bench.load(exported / "model.onnx")


def test_a_missing_runtime_is_named(exported, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'onnxruntime', which is not installed.*pip install"):
        bench.measure(exported / "model.onnx")


def test_the_separate_process_finds_the_packages_of_this_one(exported, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"separate process: .*found$"):
        bench.memory(exported / "model.onnx")


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--threads", "-1"], ["--batch", "x"]])
def test_impossible_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(["bench", "model.onnx", *arguments])
    assert "invalid positive value" in capsys.readouterr().err


@pytest.mark.slow
def test_the_memory_of_a_file_grows_with_its_weights(tmp_path):
    def own(width: int) -> float:
        path = tmp_path / f"{width}.onnx"
        layers = nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 3)
        module = nn.Sequential(nn.Flatten(), *layers)
        names, mean, std = ("a", "b", "c"), (0.5,), (0.25,)
        trained = Trained(module=module, image_size=4, class_names=names, mean=mean, std=std)
        Onnx().export(trained, path)
        return bench.memory(path)["own_mb"]

    assert own(3072) - own(16) > 36  # 3072 * 3072 * 4 bytes are 36 MiB
