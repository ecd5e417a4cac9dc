import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kd.component import ConfigError
from kd.data import CustomDataset, Digits, ImageFolder, Raw, Splits, dark_warnings, prepare
from kd.data import prepare as prepare_function
from tests.checks_data import contents
from tests.data.toys import make_pictures

STRIPES = CustomDataset(path="tests.data.toys:Stripes")
QUARTERS = Splits(val=0.25, test=0.25)


class _Fixed:
    """A data set that returns the Raw it is given."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def read(self) -> Raw:
        return Raw(**self.fields)


def _prepare(dataset: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    options = {"image_size": 8, "channels": 1, "seed": 0, "folder": folder, **changes}
    return prepare_function(dataset, options.pop("splits", QUARTERS), **options)


def test_mean_and_std_are_exact(tmp_path: Path) -> None:
    record = prepare(Digits(), QUARTERS, image_size=8, channels=1, seed=0, folder=tmp_path / "d")
    values = np.load(tmp_path / "d" / "train" / "images.npy").ravel().tolist()
    mean = Fraction(sum(values), 255 * len(values))
    mean_square = Fraction(sum(v * v for v in values), 255**2 * len(values))
    assert record["mean"] == [float(mean)]
    assert math.isclose(record["std"][0], math.sqrt(mean_square - mean**2), rel_tol=1e-15)


def test_images_that_fit_are_stored_unchanged(tmp_path: Path) -> None:
    _prepare(Digits(), tmp_path / "d")
    rows_N = np.load(tmp_path / "d" / "val" / "indices.npy")
    stored = np.load(tmp_path / "d" / "val" / "images.npy")
    assert np.array_equal(stored[..., 0], np.asarray(Digits().read().images)[rows_N])


def test_a_failure_leaves_the_former_data_as_it_was(tmp_path: Path) -> None:
    root = make_pictures(tmp_path / "pictures", {"ant": 8, "bee": 8})
    folder = tmp_path / "data"
    _prepare(STRIPES, folder)
    before = contents(folder)
    (root / "bee" / "1.jpg").write_bytes((root / "bee" / "1.jpg").read_bytes()[:300])
    with pytest.raises(ConfigError, match=r"bee/1\.jpg cannot be read as an image"):
        _prepare(ImageFolder(root=str(root)), folder)
    assert contents(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "pictures"]


def test_all_pictures_that_cannot_be_read_are_named_in_one_run(tmp_path: Path) -> None:
    root = make_pictures(tmp_path / "pictures", {"ant": 8, "bee": 30})
    for number in range(2, 25):
        (root / "bee" / f"{number}.jpg").write_bytes(b"no picture")
    with pytest.raises(ConfigError) as refused:
        _prepare(ImageFolder(root=str(root)), tmp_path / "data")
    lines = str(refused.value).splitlines()
    wrong = sorted(f"{root}/bee/{number}.jpg" for number in range(2, 25))
    assert [line.partition(" cannot be read")[0] for line in lines[:20]] == wrong[:20]
    assert lines[20:] == ["and 3 more"]


@pytest.mark.parametrize(("bits", "brightest"), [(16, None), (12, 15)])
def test_greys_of_twelve_bits_in_sixteen_are_warned_of(
    tmp_path: Path, bits: int, brightest: int | None
) -> None:
    greys = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8)
    for number in range(16):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(greys, number)).save(path)
    dataset = ImageFolder(root=str(tmp_path / "pictures"))
    _prepare(dataset, tmp_path / "data")
    warnings = dark_warnings(tmp_path / "data", dataset.read())
    found = [each.partition(" of 255")[0].rpartition(" ")[2] for each in warnings]
    assert found == ([str(brightest)] if brightest else [])


def test_what_is_wrong_with_every_image_of_an_array_is_said_once(tmp_path: Path) -> None:
    images, labels_N = np.zeros((20, 4, 4, 2), np.uint8), np.arange(20) % 2
    two = _Fixed(images=images, labels_N=labels_N, class_names=("a", "b"))
    with pytest.raises(ConfigError, match=r"^an image has 2 channels; it must have 1, 3 or 4$"):
        _prepare(two, tmp_path / "data")


def test_a_full_disk_leaves_the_former_data_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource
    import signal

    folder = tmp_path / "data"
    _prepare(STRIPES, folder)
    before = contents(folder)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # no file may grow beyond 20 kB: writing fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        with pytest.raises(OSError, match="too large"):
            _prepare(STRIPES, folder, image_size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(folder) == before


def test_remains_of_an_interrupted_run_and_foreign_files_do_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (tmp_path / ".data.partial" / "train").mkdir(parents=True)
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "stale.npy").write_text("stale")
    (folder / ".gitignore").write_text("/train\n")
    _prepare(STRIPES, folder)
    assert not (folder / "train" / "stale.npy").exists()
    assert (folder / ".gitignore").read_text() == "/train\n"
    assert not (tmp_path / ".data.partial").exists()


def test_the_hash_follows_the_images_not_the_place_they_came_from(tmp_path: Path) -> None:
    counts = {"ant": 8, "bee": 8}
    roots = [make_pictures(tmp_path / name, counts) for name in ("here", "there")]
    one, two = (_prepare(ImageFolder(root=str(root)), tmp_path / "d") for root in roots)
    assert one["data_hash"] == two["data_hash"]
    Image.new("L", (14, 10)).save(roots[1] / "ant" / "0.jpg")
    assert (
        _prepare(ImageFolder(root=str(roots[1])), tmp_path / "d")["data_hash"] != one["data_hash"]
    )
    (roots[0] / "ant").rename(roots[0] / "aphid")
    assert (
        _prepare(ImageFolder(root=str(roots[0])), tmp_path / "d")["data_hash"] != one["data_hash"]
    )


def test_raw_keeps_arrays_and_lists_pictures(tmp_path: Path) -> None:
    _prepare(CustomDataset(path="tests.data.toys:WithTest"), tmp_path / "d",
             splits=Splits(val=6, test="official"))  # fmt: skip
    raw = tmp_path / "d" / "raw"
    assert {path.name for path in raw.iterdir()} == {
        "images.npy", "labels.npy", "is_test.npy", "classes.json",
    }  # fmt: skip
    assert np.load(raw / "images.npy").shape == (60, 9, 7)
    root = make_pictures(tmp_path / "pictures", {"ant": 8, "bee": 8})
    _prepare(ImageFolder(root=str(root)), tmp_path / "d")
    assert {path.name for path in raw.iterdir()} == {"files.csv", "labels.npy", "classes.json"}
    lines = (raw / "files.csv").read_text().splitlines()
    assert lines[0] == "path,bytes,sha256"
    assert lines[1].startswith(f"ant/0.jpg,{(root / 'ant' / '0.jpg').stat().st_size},")
    assert json.loads((raw / "classes.json").read_text()) == ["ant", "bee"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(images=np.zeros((0, 4, 4), np.uint8), labels_N=np.zeros(0, int)), "no image"),
        (dict(images=np.zeros((8, 4, 4), np.float32)), "must be one uint8 array"),
        (dict(images=[np.zeros((4, 4), np.uint8)] * 8), "images is list; .* one uint8 array"),
        (dict(labels_N=np.zeros(7, int)), r"labels_N has shape \(7,\)"),
        (dict(labels_N=np.zeros(8)), "one integer for each of 8"),
        (dict(labels_N=np.full(8, 2)), r"must be in 0\.\.1"),
        (dict(labels_N=np.full(8, -2)), "is in -2"),
        (dict(class_names=("a",)), "two or more different names"),
        (dict(class_names=("a", "a")), "two or more different names"),
        (dict(class_names=("a", "b\nc")), r"class name 'b\\nc' is not one line"),
        (dict(class_names=(0, 1)), "the name 0 is not a string"),
        (dict(class_names=("a", "")), "class name '' is not one line"),
        (dict(class_names=2), "class_names is 2; it must be a tuple of two or more"),
        (dict(class_names="ab"), "class_names is 'ab'; it must be a tuple"),
        (dict(is_test_N=np.zeros(3, bool)), "is_test_N has shape"),
        (dict(files=(Path("x"),)), "files names 1 files"),
        (dict(images=np.zeros((8, 4, 4, 2), np.uint8)), "has 2 channels"),
        (dict(images=np.zeros((8, 4, 4, 2, 2), np.uint8)), "must be uint8"),
        (dict(), "channel 0 is the same in every pixel .*; check the images"),
    ],
)
def test_a_malformed_data_set_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sound = dict(
        images=np.zeros((8, 4, 4), np.uint8), labels_N=np.arange(8) % 2, class_names=("a", "b")
    )
    with pytest.raises(ConfigError, match=message):
        _prepare(_Fixed(**{**sound, **fields}), tmp_path / "d", splits=Splits(val=2, test=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [dict(image_size=0), dict(channels=2)])
def test_sizes_out_of_range_are_refused(bad: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        _prepare(STRIPES, tmp_path / "d", **bad)


def test_labels_may_be_a_list(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4), np.uint8)
    raw = Raw(images=images, labels_N=[0, 1] * 4, class_names=("a", "b"), is_test_N=[False] * 8)
    assert (raw.labels_N.shape, raw.is_test_N.dtype) == ((8,), np.dtype(bool))
