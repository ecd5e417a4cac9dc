"""Classifies pictures with the exported file in this folder: what an app has to do, in Python.

    from classify import Classifier
    Classifier(".").predict(images)  # uint8 (N, height, width, channels)

    python classify.py picture.jpg ...  # of any size; also needs Pillow

Every bundle has a copy of this file, and MLflow loads exports with it, so it does not import `kd`:
only numpy and the file's runtime (onnxruntime; executorch with torch; ai-edge-litert).  Core ML
runs only on Apple devices and is not supported here.

Shapes: N pictures, H W picture, C classes.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Call = Callable[["NDArray[Any]"], "NDArray[np.float32]"]


class Classifier:
    """A loaded bundle: pictures in, class names and probabilities out."""

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        """Args: the bundle's folder, and how many threads the runtime may use.

        ExecuTorch uses the same number of threads for all files in a process.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is altered, or does not run here.
        """
        folder = Path(folder)
        check(folder, "preprocessing.json", "labels.txt")
        self.form = json.loads((folder / "preprocessing.json").read_text("utf-8"))
        self.labels = np.array((folder / "labels.txt").read_text("utf-8").split("\n")[:-1])
        if len(self.labels) != self.form["output"]["shape"][-1]:
            raise ValueError(f"{folder} has {len(self.labels)} labels, which are for another file")
        path = folder / self.form["file"]
        if path.suffix not in RUNTIMES:
            raise ValueError(f"{path.name} does not run here; these do: {', '.join(RUNTIMES)}")
        check(folder, path.name)
        self._call = RUNTIMES[path.suffix](path, self.form, threads)

    def predict(
        self, images: "NDArray[np.uint8]", params: dict[str, Any] | None = None
    ) -> dict[str, "NDArray[Any]"]:
        """Classify pictures.

        Args:
            images: uint8 (N, H, W, channels), of the size given in preprocessing.json.
            params: Unused; MLflow passes it.

        Returns:
            label (N,): the most probable class; probabilities (N, C), in the order of labels.txt.
        """
        scores_NC: NDArray[Any] = self.scores(images)
        if self.form["output"]["meaning"] == "logits":
            scores_NC = softmax(scores_NC)
        label_N = self.labels[scores_NC.argmax(1)]
        return {"label": label_N, "probabilities": scores_NC.astype(np.float32)}

    def scores(self, images: "NDArray[np.uint8]") -> "NDArray[np.float32]":
        """The file's own outputs for pictures: (N, C), logits or probabilities."""
        images_NHWc = np.asarray(images)
        picture = self.form["picture"]
        wanted = (picture["height"], picture["width"], picture["channels"])
        if images_NHWc.dtype != np.uint8 or images_NHWc.shape[1:] != wanted:
            raise ValueError(
                f"pictures are {images_NHWc.dtype} {images_NHWc.shape}; "
                f"they must be uint8 ('N', {', '.join(map(str, wanted))})"
            )
        given = images_NHWc if self.form["inside_the_graph"] else self.normalised(images_NHWc)
        if self.form["input"]["shape"][0] != 1:
            return self._call(given)
        return np.concatenate([self._call(one[None]) for one in given])

    def normalised(self, images_NHWc: "NDArray[np.uint8]") -> "NDArray[np.float32]":
        """(pixel / 255 - mean) / std, channels first: (N, channels, H, W).

        The order of operations is that of training, so that results are bit-identical.
        """
        mean, std = (np.array(self.form[key]) for key in ("mean", "std"))
        scale = (1 / (255 * std)).astype(np.float32)
        values_NHWc = (images_NHWc.astype(np.float32) - (255 * mean).astype(np.float32)) * scale
        return np.ascontiguousarray(values_NHWc.transpose(0, 3, 1, 2))


def check(folder: Path, *names: str) -> None:
    """Refuse files that do not match SHA256SUMS: truncated, or from another bundle."""
    lines = (folder / "SHA256SUMS").read_text("utf-8").splitlines()
    for name in names:
        if f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" not in lines:
            raise ValueError(f"{folder / name} does not match SHA256SUMS: copy the folder again")


def softmax(logits_NC: "NDArray[Any]") -> "NDArray[np.float64]":
    """Probabilities (N, C); the largest logit is subtracted first to avoid overflow."""
    powers_NC = np.exp(logits_NC.astype(np.float64) - logits_NC.max(1, keepdims=True))
    probabilities: NDArray[np.float64] = powers_NC / powers_NC.sum(1, keepdims=True)
    return probabilities


def onnx(path: Path, form: dict[str, Any], threads: int) -> Call:
    """Load the file in ONNX Runtime."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it would report its use to Microsoft
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda given: session.run([form["output"]["name"]], {form["input"]["name"]: given})[0]


def executorch(path: Path, form: dict[str, Any], threads: int) -> Call:
    """Load the file in ExecuTorch's runtime, whose inputs and outputs have only positions.

    The runtime has one thread pool per process, and XNNPACK keeps the address of the pool that
    existed when it loaded a file: from then on the pool must not be replaced.  The number of
    threads is noted on the runtime's module, because each bundle has its own copy of this file.

    Raises:
        ValueError: a file is already loaded with another number of threads.
    """
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    taken = getattr(portable_lib, "classify_threads", threads)
    if taken != threads:
        raise ValueError(
            f"threads is {threads}, but ExecuTorch has loaded a file with {taken} threads in this "
            f"process: use {taken} here too, or run the file in a separate process"
        )
    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(path.read_bytes())
    method = program.load_method("forward")
    portable_lib.classify_threads = threads

    def call(given: "NDArray[Any]", keeps: Any = program) -> "NDArray[np.float32]":
        (scores,) = method.execute([torch.tensor(given)])  # `keeps`: program must outlive method
        found: NDArray[np.float32] = scores.numpy().copy()
        return found

    return one_at_a_time(call)


def litert(path: Path, form: dict[str, Any], threads: int) -> Call:
    """Load the file in LiteRT, called by the names in its signature."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=threads)
    runner = interpreter.get_signature_runner()
    given_as, found_as = form["input"]["name"], form["output"]["name"]
    return one_at_a_time(lambda given: runner(**{given_as: given})[found_as].copy())


def one_at_a_time(call: Call) -> Call:
    """Serialise calls with a lock: the file has one set of buffers, a server many threads."""
    turn = Lock()

    def guarded(given: "NDArray[Any]") -> "NDArray[np.float32]":
        with turn:
            return call(given)

    return guarded


RUNTIMES = {".onnx": onnx, ".pte": executorch, ".tflite": litert}
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What a picture may be, whatever its name: for EPS, Pillow would start Ghostscript."""


def read(path: str, form: dict[str, Any]) -> "NDArray[np.uint8]":
    """Read a picture as preprocessing.json specifies: (H, W, channels).

    Turned upright, composited over white, centre-cropped to a square and resized: pixel for
    pixel what the network was trained and evaluated on.

    Raises:
        ValueError: its pixels are 32-bit numbers, whose value for white is unknown.
    """
    from PIL import Image, ImageOps

    wanted = form["picture"]
    with Image.open(path, formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file)
        image.load()
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"{path} has {image.mode!r} pixels; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode not in ("1", "L"):
        image = image.convert("RGB")
    image = image.convert("L" if wanted["channels"] == 1 else "RGB")
    size = (wanted["width"], wanted["height"])
    if image.size != size:
        image = ImageOps.fit(image, size, method=Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(*size[::-1], wanted["channels"])


def main(files: list[str]) -> int:
    """Print each picture's label and its probability; return the exit status."""
    if not files:
        print("usage: python classify.py PICTURE ...", file=sys.stderr)
        return 2
    try:
        classifier = Classifier(Path(__file__).parent)
        for file in files:
            found = classifier.predict(read(file, classifier.form)[None])
            print(f"{file}: {found['label'][0]} {found['probabilities'].max():.4f}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "PIL":
            raise
        print("error: Pillow reads the pictures: pip install pillow", file=sys.stderr)
        return 1
    except Exception as error:  # Pillow and each runtime raise their own types
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _load_pyfunc(folder: str) -> Classifier:
    """Called by `mlflow.pyfunc.load_model`."""
    return Classifier(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
