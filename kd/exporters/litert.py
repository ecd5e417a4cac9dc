"""LiteRT (TensorFlow Lite): one .tflite file for Android, converted in a separate environment.

Shapes: C classes, H W image.
"""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kd.component import ConfigError, component
from kd.disk import temporary
from kd.exporters.files import (
    Runner,
    captured,
    counted,
    exporting,
    in_canonical_memory,
    readable,
    require_packages,
    without_lines,
    write,
)
from kd.exporters.format import Tolerance
from kd.exporters.int8 import Int8
from kd.exporters.trained import Trained

WORKER = Path(__file__).with_name("litert_worker.py")
PYTHON = "KD_LITERT_PYTHON"
"""Environment variable: the converter's Python, if it is not the one from `make litert`."""
ABOUT = "metadata.json"
"""The file's description, stored next to labels.txt in the ZIP archive at its end."""


@component
class LiteRT:
    """A program that takes one image at a time, delegated to XNNPACK."""

    kind: Literal["litert"] = "litert"
    precision: Literal["fp32", "int8"] = "fp32"
    int8: Int8 = Int8()
    """Quantisation settings; used only if the precision is int8."""
    picture_input: bool = False
    """Take pictures (uint8, NHWC), return probabilities; off: normalised images and logits."""
    tolerance: Tolerance = Tolerance()
    """How far outputs may differ from the eager network's before the file is refused."""

    suffix: ClassVar[str] = ".tflite"
    runs_here: ClassVar[bool] = True

    def check(self) -> None:
        """Raise a ConfigError if the runtime or the converter's environment is missing."""
        require_packages("ai_edge_litert")
        converter()

    def export(self, trained: Trained, path: Path) -> None:
        """Write the network to `path`, with labels.txt and metadata.json as associated files.

        Raises:
            ConfigError: the runtime or the converter's environment is missing, the network cannot
                be exported, or the precision is int8 and there are no calibration pictures.
        """
        self.check()
        images = None
        if self.precision == "int8":
            images = trained.calibration(self.int8.calibration_images, self.picture_input)
        name = "probabilities" if self.picture_input else "logits"
        program = captured(
            _Named(trained.served(self.picture_input), name), trained.example(self.picture_input)
        )
        with exporting("a LiteRT program"):
            write(path, _with_files(_converted(program, images), trained))

    def load(self, path: Path, threads: int = 1) -> Runner:
        """Load the file at `path` in the LiteRT runtime.

        Raises:
            ConfigError: the package is not installed, or the file is not a LiteRT program.
        """
        data = path.read_bytes()
        with _litert(), readable(path, "a LiteRT program"):
            program = _interpreter(data, threads).get_signature_runner()
            ((given, image),) = program.get_input_details().items()
            ((found, _),) = program.get_output_details().items()
            _, first, second, third = image["shape"].tolist()

        def run(image: Tensor) -> Tensor:
            return torch.from_numpy(program(**{given: image.numpy()})[found])

        pictures = image["dtype"].__name__ == "uint8"
        return Runner(run, (first, second, third), False, threads, pictures)

    def inspect(self, path: Path) -> dict[str, Any]:
        """Describe the file at `path`.

        Returns:
            inputs and outputs (shape by name), operators (calls of each), undelegated (those
            that XNNPACK left to the slower reference kernels), labels, metadata, and the runtime
            that read it.
        """
        data = path.read_bytes()
        with _litert(), readable(path, "a LiteRT program"):
            interpreter = _interpreter(data, threads=1)
            program = interpreter.get_signature_runner()
            given, found = program.get_input_details(), program.get_output_details()
            calls = interpreter._get_ops_details()
            with zipfile.ZipFile(io.BytesIO(data)) as files:
                metadata = json.loads(files.read(ABOUT))
        return {
            "inputs": {name: each["shape"].tolist() for name, each in given.items()},
            "outputs": {name: each["shape"].tolist() for name, each in found.items()},
            "operators": counted(call["op_name"] for call in calls if not _delegate(call)),
            "undelegated": counted(call["op_name"] for call in _undelegated(calls)),
            "labels": json.loads(metadata["labels"]),
            "metadata": metadata,
            "runtime": f"LiteRT {version('ai-edge-litert')}",
        }


class Unconvertible(RuntimeError):
    """LiteRT's converter rejected the network; the message is the converter's own."""


class _Named(nn.Module):
    """Wraps a network to give its output a name."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {self.name: self.network(image)}


def converter() -> Path:
    """The Python that has litert-torch: KD_LITERT_PYTHON, or .venv-litert next to our venv.

    Raises:
        ConfigError: it does not exist.
    """
    neighbour = Path(sys.prefix).with_name(".venv-litert") / "bin" / "python"
    python = Path(os.environ.get(PYTHON, neighbour))
    if not python.is_file():
        raise ConfigError(
            f"exports to LiteRT are converted in a separate environment, and its {python} is "
            f"missing; run: make litert, or set {PYTHON} to a Python that has litert-torch"
        )
    return python


def _converted(program: torch.export.ExportedProgram, images: Tensor | None) -> bytes:
    """Have the worker convert a graph, calibrated on `images` if given."""
    import numpy

    with temporary() as named:
        folder = Path(named)
        torch.export.save(program, folder / "program.pt2")
        if images is not None:
            numpy.save(folder / "calibration.npy", in_canonical_memory(images).numpy())
        done = subprocess.run(
            [converter(), "-P", WORKER, folder],
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            check=False,
        )
        if (refused := folder / "refused.txt").exists():
            raise Unconvertible(refused.read_text("utf-8"))
        if done.returncode:
            raise ConfigError(
                f"{converter()} could not run LiteRT's converter ({_last_line(done.stderr)}); "
                "rebuild its environment with: make litert"
            )
        return (folder / "model.tflite").read_bytes()


def _with_files(data: bytes, trained: Trained) -> bytes:
    """Append labels and description to the flatbuffer, as TensorFlow Lite's associated files.

    They form a ZIP archive: `unzip model.tflite` extracts them, and runtimes ignore them.
    """
    labels = "".join(f"{name}\n" for name in trained.class_names)
    about = json.dumps(trained.description(), indent=2)
    stream = io.BytesIO(data)
    with zipfile.ZipFile(stream, "a") as files:
        for name, text in (("labels.txt", labels), (ABOUT, about)):
            files.writestr(zipfile.ZipInfo(name), text)  # ZipInfo's fixed date: reproducible
    return stream.getvalue()


def _interpreter(data: bytes, threads: int) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    if data[4:8] != b"TFL3":
        raise ValueError("it lacks the identifier TFL3")
    interpreter = Interpreter(model_content=data, num_threads=threads)
    interpreter.allocate_tensors()  # this also delegates the graph to XNNPACK
    return interpreter


def _undelegated(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls that do not lie between the inputs and outputs of any delegate call."""
    maker = {int(out): call for call in calls for out in call["outputs"] if not _delegate(call)}
    taken: set[int] = set()
    for call in filter(_delegate, calls):
        given, open_ = set(map(int, call["inputs"])), list(map(int, call["outputs"]))
        while open_:
            tensor = open_.pop()
            made_by = maker.get(tensor)
            if tensor in given or made_by is None or made_by["index"] in taken:
                continue
            taken.add(made_by["index"])
            open_.extend(map(int, made_by["inputs"]))
    return [call for call in calls if not _delegate(call) and call["index"] not in taken]


def _delegate(call: dict[str, Any]) -> bool:
    return bool(call["op_name"] == "DELEGATE")


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


@contextmanager
def _litert() -> Iterator[None]:
    """Check that the runtime is installed; call it without its log line about XNNPACK."""
    require_packages("ai_edge_litert")
    with without_lines("INFO: Created TensorFlow Lite XNNPACK delegate"):
        yield
