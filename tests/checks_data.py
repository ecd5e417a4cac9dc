"""What every data set must do; one line checks your own:

    check_dataset(MyDataset(), tmp_path, Splits(val=0.2, test=0.2))

Shape suffixes: N samples.
"""

import json
from pathlib import Path

import numpy as np
import torch

from kd.data import Dataset, Images, Splits, prepare

NAMES = ("train", "pool", "val", "test")


def check_dataset(
    dataset: Dataset, folder: Path, splits: Splits, image_size: int = 12, channels: int = 3
) -> None:
    raw = dataset.read()
    record = prepare(
        dataset, splits, image_size=image_size, channels=channels, seed=3, folder=folder / "one"
    )
    check_prepared(folder / "one", num=len(raw.labels_N), num_classes=len(raw.class_names))
    check_labels(folder / "one", np.asarray(raw.labels_N))
    check_mean_and_std(folder / "one")
    assert record["class_names"] == list(raw.class_names)
    again = prepare(
        dataset, splits, image_size=image_size, channels=channels, seed=3, folder=folder / "two"
    )
    assert again == record
    assert contents(folder / "two") == contents(folder / "one")
    other = prepare(
        dataset, splits, image_size=image_size, channels=channels, seed=4, folder=folder / "two"
    )
    assert other["data_hash"] != record["data_hash"]


def check_prepared(folder: Path, num: int, num_classes: int) -> None:
    """Every image is in one split, every class in each that needs it, in the promised types."""
    record = json.loads((folder / "data.json").read_text("utf-8"))
    side, channels = record["image_size"], record["channels"]
    indices = []
    for name in NAMES:
        images = np.load(folder / name / "images.npy")
        labels_N = np.load(folder / name / "labels.npy")
        indices.append(np.load(folder / name / "indices.npy"))
        assert images.dtype == np.uint8
        assert images.shape == (record["splits"][name]["count"], side, side, channels)
        assert labels_N.dtype == indices[-1].dtype == np.int64
        assert len(labels_N) == len(indices[-1]) == len(images)
        if name == "pool":
            assert (labels_N == -1).all()
        else:
            assert set(labels_N.tolist()) == set(range(num_classes))
            assert np.bincount(labels_N).tolist() == record["splits"][name]["per_class"]
        opened = Images.load(folder, name)
        assert torch.equal(opened.pixels_NHWC, torch.from_numpy(images))
        assert torch.equal(opened.labels_N, torch.from_numpy(labels_N))
    assert sorted(np.concatenate(indices).tolist()) == list(range(num))


def check_labels(folder: Path, labels_N: np.ndarray) -> None:
    for name in ("train", "val", "test"):
        indices = np.load(folder / name / "indices.npy")
        assert np.array_equal(np.load(folder / name / "labels.npy"), labels_N[indices])


def check_mean_and_std(folder: Path) -> None:
    record = json.loads((folder / "data.json").read_text("utf-8"))
    parts = [np.load(folder / name / "images.npy") for name in ("train", "pool")]
    pixels = np.concatenate(parts).astype(np.float64).reshape(-1, record["channels"]) / 255
    np.testing.assert_allclose(record["mean"], pixels.mean(0), rtol=1e-10)
    np.testing.assert_allclose(record["std"], pixels.std(0), rtol=1e-10)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
