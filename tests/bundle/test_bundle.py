"""A bundle as its user has it: whole, true to its card, or refused."""

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd import artifacts, bundle
from kd.artifacts import ArtifactError
from kd.bundle import checksums
from kd.bundle import classify as classify_module
from kd.bundle.card import card
from kd.bundle.classify import Classifier
from kd.bundle.form import preprocessing
from kd.bundle.loading import SNIPPETS
from kd.component import Refused
from kd.data.pictures import read_picture, to_square
from kd.exporters import ExecuTorch, LiteRT, Onnx
from tests.bundle.toys import CLASSES, DATA, bundled, outsider


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle to be read only."""
    return bundled(tmp_path_factory.mktemp("bundle"), Onnx())


@pytest.mark.parametrize(
    "program",
    [
        "from classify import Classifier; Classifier('.')",
        "from pathlib import Path; from kd import bench; bench.load(Path('model.onnx'))",
    ],
)
def test_onnx_runtime_neither_numbers_this_machine_nor_reports_its_use(made, program, tmp_path):
    project = Path(bundle.__file__).parents[2]
    environment = {"HOME": str(tmp_path), "PYTHONPATH": f"{made.folder}:{project}"}
    subprocess.run([sys.executable, "-c", program], cwd=made.folder, env=environment, check=True)
    assert not list(tmp_path.rglob("*onnxruntime*"))


@pytest.fixture
def spare(made, tmp_path):
    """A copy that a test may spoil."""
    return replace(made, folder=shutil.copytree(made.folder, tmp_path / "onnx"))


@pytest.mark.parametrize(
    ("exporter", "absent"),
    [
        (Onnx(), "kd,torch,mlflow"),
        (Onnx(dynamic_batch=True, picture_input=True), "kd,torch,mlflow"),
        pytest.param(Onnx(precision="int8"), "kd,torch,mlflow", marks=pytest.mark.slow),
        pytest.param(ExecuTorch(picture_input=True), "kd,mlflow", marks=pytest.mark.slow),
        pytest.param(ExecuTorch(), "kd,mlflow", marks=pytest.mark.slow),
        pytest.param(LiteRT(), "kd,torch,mlflow", marks=pytest.mark.slow),
        pytest.param(LiteRT(picture_input=True), "kd,torch,mlflow", marks=pytest.mark.slow),
    ],
)
def test_an_outsider_finds_the_accuracy_of_the_card_by_the_cards_own_lines(
    exporter, absent, tmp_path
):
    one = bundled(tmp_path, exporter)
    np.save(tmp_path / "images.npy", one.images_NHWC)
    found = outsider(one.folder, tmp_path / "images.npy", absent)
    card = (one.folder / "MODEL_CARD.md").read_text()
    written = re.search(r"\| accuracy \| (\S+) ± (\S+) \(n = 40\)", card)
    accuracy = np.mean(found["index"] == one.labels_N)
    assert written[1] == f"{accuracy:.4f}" == "0.7500"
    assert float(written[2]) == pytest.approx(np.sqrt(0.75 * 0.25 / 40), abs=1e-4)
    if one.parity["precision"] == "int8":
        return
    powers_NC = np.exp(one.logits_NC.astype(np.float64))
    probabilities_NC = powers_NC / powers_NC.sum(1, keepdims=True)
    np.testing.assert_allclose(found["probabilities"], probabilities_NC, atol=1e-5)


def classify(folder, *files, **environment):
    """What the bundle's classify.py prints and says, and its exit status."""
    command = [sys.executable, "-B", folder / "classify.py", *files]
    whole = {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder.parent, env=whole, capture_output=True, text=True)
    return done.stdout.splitlines(), done.stderr.splitlines(), done.returncode


def test_pictures_on_the_command_line_are_classified_as_the_project_prepares_them(made, tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (30, 20, 4), np.uint8)
    deep = Image.fromarray(random[:, :, 0].astype(np.uint16) * 257)
    files = []
    for mode in ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16"):
        files.append(tmp_path / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}")
        picture = deep if mode == "I;16" else Image.fromarray(random).convert(mode)
        picture.save(files[-1])
    turned = Image.Exif()
    turned[0x0112] = 6
    files.append(tmp_path / "turned.png")
    Image.fromarray(random[:, :, :3]).save(files[-1], exif=turned)
    Image.fromarray(made.images_NHWC[0]).save(tmp_path / "fits.png")
    files.append(tmp_path / "fits.png")
    squares = [to_square(read_picture(file), 8, 3) for file in files]
    form = json.loads((made.folder / "preprocessing.json").read_text())
    for file, square in zip(files, squares, strict=True):
        np.testing.assert_array_equal(classify_module.read(str(file), form), square, file.name)
    found = Classifier(made.folder).predict(np.stack(squares))
    tops = found["probabilities"].max(1)
    assert classify(made.folder, *map(str, files), PYTHONUTF8="1") == (
        [f"{f}: {one} {p:.4f}" for f, one, p in zip(files, found["label"], tops, strict=True)],
        [],
        0,
    )


def test_the_command_line_says_what_is_missing(made, tmp_path):
    assert classify(made.folder) == ([], ["usage: python classify.py PICTURE ..."], 2)
    said = [f"error: [Errno 2] No such file or directory: '{tmp_path}/none.png'"]
    assert classify(made.folder, f"{tmp_path}/none.png") == ([], said, 1)
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL/__init__.py").write_text("raise ModuleNotFoundError(name='PIL')")
    said = ["error: Pillow reads the pictures: pip install pillow"]
    assert classify(made.folder, "a.png", PYTHONPATH=str(tmp_path)) == ([], said, 1)


def test_sha256sum_agrees(made):
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    subprocess.run(command, cwd=made.folder, check=True)
    written = {path.name for path in made.folder.iterdir() if path.is_file()}
    assert list(checksums.check(made.folder)) == sorted(written - {"SHA256SUMS"})


@pytest.mark.parametrize(
    "exporter",
    [Onnx(), *(pytest.param(each, marks=pytest.mark.slow) for each in (ExecuTorch(), LiteRT()))],
)
def test_the_same_student_gives_the_same_bytes(exporter, tmp_path):
    one, other = (bundled(tmp_path / each, exporter) for each in ("one", "other"))
    names = [path.name for path in one.folder.iterdir()]
    assert filecmp.cmpfiles(one.folder, other.folder, names, shallow=False)[0] == names


def test_a_bundle_names_its_teachers_classes_and_preprocessing(made):
    assert (made.folder / "labels.txt").read_text("utf-8").split("\n") == [*CLASSES, ""]
    card = (made.folder / "MODEL_CARD.md").read_text("utf-8")
    for shown in ("assistants/a | 0.7500", "猫", "train 12, val 40", made.parity["sha256"]):
        assert shown in card
    form = json.loads((made.folder / "preprocessing.json").read_text())
    shape = made.parity["inputs"][form["input"]["name"]]
    assert (form["input"]["shape"], form["input"]["layout"]) == (shape, "NCHW")
    assert (form["mean"], form["picture"]["colour_order"]) == ([0.5, 0.4, 0.3], "RGB")
    student = json.loads((made.folder / "student.json").read_text())
    assert student["sha256"] == made.student.sha256


@pytest.mark.parametrize("suffix", SNIPPETS)
@pytest.mark.parametrize("outputs", [{"logits": [1, 3]}, {"probabilities": [1, 3]}])
def test_every_card_has_lines_for_every_language(made, suffix, outputs):
    parity = made.parity | {"file": f"model{suffix}", "outputs": outputs}
    text = card(parity, made.student, DATA, preprocessing(parity, made.student))
    titles = re.findall(r"^### (.+)", text, re.M)
    assert titles == ["Kotlin", "Swift", "Python", "C++"]
    assert "$" not in text
    inside = "image, CGImage" if suffix == ".mlpackage" else "uint8, NHWC"
    assert (inside in text) == ("probabilities" in outputs)
    if suffix != ".mlpackage":  # whose lines need neither type nor shape
        code = "".join(re.findall(r"^```.*?^```", text, re.M | re.S))
        assert ("pixels" in code) == ("probabilities" in outputs)
        assert "1, 3, 8, 8" in code
    assert ("FloatArray(3)" in text) == (suffix == ".tflite")


def test_a_card_says_so_where_the_files_own_runtime_did_not_run(made):
    parity = made.parity | {"verified_by": "an interpreter"}
    text = card(parity, made.student, DATA, preprocessing(parity, made.student))
    assert "Not run in its own runtime" in text
    assert "Measured in its own runtime" not in text
    assert "kd bench" not in text


def test_a_card_says_what_both_ways_to_int8_gave(made):
    parity = made.parity | {"chosen": "qat", "ptq_val_accuracy": 0.5, "qat_val_accuracy": 0.75}
    text = card(parity, made.student, DATA, preprocessing(parity, made.student))
    assert "| calibrated only | 0.5000 |\n" in text
    assert "| fine-tuned with simulated int8 (this file) | 0.7500 |\n" in text


def test_classes_that_do_not_fit_the_outputs_are_refused(spare):
    more = replace(spare.student, class_names=("a", "b", "c", "d"))
    with pytest.raises(Refused, match=r"logits of shape \[1, 3\].*4 class names"):
        bundle.write(spare.folder, spare.parity, more, DATA)


@pytest.mark.parametrize("name", ["two\nlines", "", "line\u2028separator"])
def test_a_class_name_that_is_not_one_line_is_refused(spare, name):
    named = replace(spare.student, class_names=("a", name, "c"))
    with pytest.raises(Refused, match="is not one line"):
        bundle.write(spare.folder, spare.parity, named, DATA)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"another"), Path.unlink])
def test_another_file_than_the_compared_one_is_not_bundled(spare, spoil):
    spoil(spare.folder / "model.onnx")
    with pytest.raises(ArtifactError, match=r"model\.onnx is not the file that was compared"):
        bundle.write(spare.folder, spare.parity, spare.student, DATA)


def test_a_crash_at_any_moment_leaves_nothing_that_passes_for_a_bundle(spare, monkeypatch):
    exported = (spare.folder / "model.onnx").read_bytes()
    write = artifacts.atomic
    for survived in range(7):
        count = iter(range(survived))

        def crash(path, count=count):
            if next(count, None) is None:
                raise KeyboardInterrupt
            return write(path)

        bundle.clear(spare.folder)
        (spare.folder / "model.onnx").write_bytes(exported)
        monkeypatch.setattr(artifacts, "atomic", crash)
        with pytest.raises(KeyboardInterrupt):
            bundle.write(spare.folder, spare.parity, spare.student, DATA)
        assert len(list(spare.folder.iterdir())) == 1 + survived
        with pytest.raises(ArtifactError, match="no SHA256SUMS"):
            checksums.check(spare.folder)
    bundle.clear(spare.folder)
    assert not list(spare.folder.iterdir())


def test_a_foreign_file_stops_an_export_and_is_kept(spare):
    (spare.folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt is not part of an export"):
        bundle.clear(spare.folder)
    assert (spare.folder / "SHA256SUMS").exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "labels.txt").write_text("cat\ndog\n"), r"labels\.txt does not match"),
        (lambda f: (f / "model.onnx").unlink(), r"model\.onnx is missing"),
        (lambda f: (f / "notes.txt").write_text("mine"), r"notes\.txt is not part"),
        (lambda f: (f / "SHA256SUMS").write_text("nonsense"), "SHA256SUMS is damaged"),
        (lambda f: (f / "SHA256SUMS").unlink(), "no SHA256SUMS.*copy the whole folder again"),
    ],
)
def test_a_spoilt_bundle_is_told_by_the_file_at_fault(spare, spoil, reason):
    checksums.check(spare.folder)
    spoil(spare.folder)
    with pytest.raises(ArtifactError, match=reason):
        checksums.check(spare.folder)


@pytest.mark.parametrize(
    "name", ["benchmark.json", "__pycache__/classify.cpython-311.pyc", ".labels.txt.part"]
)
def test_a_benchmark_python_s_cache_and_hidden_files_beside_do_not_count(spare, name):
    written = checksums.check(spare.folder)
    (spare.folder / name).parent.mkdir(exist_ok=True)
    (spare.folder / name).write_text("{}")
    assert checksums.check(spare.folder) == written
    checksums.write(spare.folder)
    assert checksums.check(spare.folder) == written
    bundle.clear(spare.folder)
    assert not list(spare.folder.iterdir())


def test_the_files_of_an_export_that_is_a_folder_count_one_by_one(tmp_path):
    package = tmp_path / "model.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Data" / "weights.bin").write_bytes(b"1")
    (package / "Manifest.json").write_text("{}")
    checksums.write(tmp_path)
    assert set(checksums.check(tmp_path)) == {
        "model.mlpackage/Data/weights.bin",
        "model.mlpackage/Manifest.json",
    }
    (package / "Data" / "weights.bin").write_bytes(b"2")
    with pytest.raises(ArtifactError, match=r"weights\.bin does not match"):
        checksums.check(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists a process's threads")
def test_onnx_runtime_uses_as_many_threads_as_it_is_told_to(made):
    for threads in (1, 3):
        before = os.listdir("/proc/self/task")
        reader = Classifier(made.folder, threads)
        started = set(os.listdir("/proc/self/task")) - set(before)
        assert len(started) == threads - 1, "the caller's thread is one of them"
        del reader


def test_labels_of_another_file_are_refused_by_the_reader(spare):
    (spare.folder / "labels.txt").write_text("cat\ndog\n")
    checksums.write(spare.folder)
    with pytest.raises(ValueError, match="has 2 labels, which are for another file"):
        Classifier(spare.folder)


@pytest.mark.parametrize("name", ["labels.txt", "model.onnx", "preprocessing.json"])
def test_a_bundle_with_a_file_of_another_is_refused_by_the_reader(spare, tmp_path, name):
    whole = (spare.folder / name).read_bytes()
    (spare.folder / name).write_bytes(whole[:-10])
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    said = f"{name} does not match SHA256SUMS: copy the folder again"
    with pytest.raises(ValueError, match=said):
        Classifier(spare.folder)
    shown, told, status = classify(spare.folder, f"{tmp_path}/black.png")
    assert (shown, told, status) == ([], [f"error: {spare.folder}/{said}"], 1)


def test_a_picture_that_training_refuses_is_refused_by_the_reader_in_one_line(made, tmp_path):
    Image.new("F", (8, 8)).save(tmp_path / "deep.tif")
    said = f"error: {tmp_path}/deep.tif has 'F' pixels; save it with 8 or 16 bits a channel"
    assert classify(made.folder, f"{tmp_path}/deep.tif") == ([], [said], 1)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "giant.png")
    shown, told, status = classify(made.folder, f"{tmp_path}/giant.png")
    assert (shown, status, len(told)) == ([], 1, 1)
    assert "400000000 pixels" in told[0]


def test_a_card_says_what_becomes_of_a_picture_and_where_the_file_ran(made):
    text = (made.folder / "MODEL_CARD.md").read_text("utf-8")
    assert "turned upright (EXIF); transparency composited over white; RGB; largest" in text
    assert f"| runtime | {made.parity['runtime']} |" in text
    assert "no licence of its own" in text
    grey = replace(made.student, channels=1)
    assert "0.299 R" in preprocessing(made.parity, grey)["picture"]["made_by"]


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "float32"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\(2, 3, 8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), r"\(8, 8, 3\)"),
    ],
)
def test_pictures_of_another_form_are_refused_by_the_reader(made, images, told):
    with pytest.raises(ValueError, match=f"pictures are .*{told}.*must be uint8"):
        Classifier(made.folder).predict(images)


TWO_COUNTS = """
import runpy, sys
import numpy as np
one, two = (runpy.run_path("classify.py")["Classifier"] for _ in range(2))  # of two bundles
images = np.load(sys.argv[1])
first = one(".", threads=2)
expected = first.predict(images)["label"]
try:
    two(".", threads=1)
except ValueError as error:
    print(error)
assert (two(".", threads=2).predict(images)["label"] == expected).all()
assert (first.predict(images)["label"] == expected).all()
"""


@pytest.mark.slow
def test_another_number_of_threads_would_take_executorch_s_pool_from_a_loaded_file(tmp_path):
    one = bundled(tmp_path, ExecuTorch())
    np.save(tmp_path / "images.npy", one.images_NHWC)
    done = subprocess.run(
        [sys.executable, "-c", TWO_COUNTS, str(tmp_path / "images.npy")],
        env={**os.environ, "MALLOC_PERTURB_": "165"},  # what is freed cannot be used any longer
        cwd=one.folder, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("threads is 1, but ExecuTorch has loaded a file with 2 threads")
