"""The sample programs: built and run where this machine can, against a real bundle."""

import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd.bundle.classify import Classifier, read
from kd.bundle.loading import SNIPPETS
from kd.exporters import ExecuTorch
from tests.bundle.toys import CLASSES, bundled

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("executorch", ["org.pytorch:executorch-android:{}", "swiftpm-{}"]),
        ("onnxruntime", ["com.microsoft.onnxruntime:onnxruntime-android:{}"]),
        ("ai-edge-litert", ["com.google.ai.edge.litert:litert:{}"]),
    ],
)
def test_samples_and_cards_name_the_runtimes_that_files_are_verified_in(package, names):
    gradle = (SAMPLES / "android/app/build.gradle.kts").read_text()
    swift = (SAMPLES / "ios/Package.swift").read_text()
    cards = str(SNIPPETS)
    for name in names:
        dependency = name.format(version(package))
        assert dependency in cards
        assert dependency in gradle + swift


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """samples/cpp, built against the runtime that the Python package ships."""
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("no C++ compiler or no CMake here")
    build = tmp_path_factory.mktemp("cpp")
    (package,) = find_spec("executorch").submodule_search_locations
    commands = (
        ["cmake", "-S", str(SAMPLES / "cpp"), "-B", str(build), "-DCMAKE_PREFIX_PATH=" + package],
        ["cmake", "--build", str(build)],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "classify"


def write_ppm(path, image_HWC):
    height, width, _ = image_HWC.shape
    path.write_bytes(f"P6\n{width} {height}\n255\n".encode() + image_HWC.tobytes())


@pytest.mark.slow
def test_the_cpp_sample_classifies_as_the_network_does(program, tmp_path):
    made = bundled(tmp_path, ExecuTorch())
    pictures = [tmp_path / f"{row}.ppm" for row in range(len(made.images_NHWC))]
    for path, image_HWC in zip(pictures, made.images_NHWC, strict=True):
        write_ppm(path, image_HWC)
    done = subprocess.run([program, made.folder, *pictures], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split("\t") for line in done.stdout.splitlines()]
    assert [name for name, _ in found] == [CLASSES[row] for row in made.logits_NC.argmax(1)]
    powers_NC = np.exp(made.logits_NC.astype(np.float64))
    expected_N = (powers_NC / powers_NC.sum(1, keepdims=True)).max(1)
    np.testing.assert_allclose([float(share) for _, share in found], expected_N, atol=1e-5)

    (tmp_path / "cut.ppm").write_bytes(b"P6\n8 8\n255\nshort")
    for name, told in (("cut", "is cut short"), ("no", "read")):
        path = tmp_path / f"{name}.ppm"
        done = subprocess.run([program, made.folder, path], capture_output=True, text=True)
        assert done.returncode == 1
        assert told in done.stderr
    (made.folder / "labels.txt").write_text("one\n")
    done = subprocess.run([program, made.folder, pictures[0]], capture_output=True, text=True)
    assert done.returncode == 1
    assert "labels.txt belongs to another file" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "size_and_mode",
    [((61, 40), "RGB"), ((5, 4), "RGB"), ((61, 40), "L"), ((8, 8), "L"), ((40, 61), "RGB")],
    ids=str,
)
def test_the_cpp_sample_resizes_as_the_reader_does(program, tmp_path, size_and_mode):
    size, mode = size_and_mode
    made = bundled(tmp_path, ExecuTorch())
    pixels = np.random.default_rng(1).integers(0, 256, (*size[::-1], len(mode)), dtype=np.uint8)
    path = tmp_path / "picture.ppm"
    Image.fromarray(pixels.squeeze()).save(path)
    done = subprocess.run([program, made.folder, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, share = done.stdout.strip().split("\t")
    reader = Classifier(made.folder)
    expected = reader.predict(read(str(path), reader.form)[None])
    assert name == expected["label"][0]
    # Of upright pictures Pillow may resize columns first, and round some pixels to the next.
    close = 1e-5 if size[0] >= size[1] else 0.03
    assert float(share) == pytest.approx(expected["probabilities"].max(), abs=close)
