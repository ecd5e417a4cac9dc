"""The battery over every member of the union; real files where KD_DATA_ROOT has them."""

import os
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from kd.data import (
    Cifar10,
    Cifar100,
    CustomDataset,
    Dataset,
    Digits,
    FashionMnist,
    ImageFolder,
    Splits,
    prepare,
)
from tests.checks_data import check_dataset, check_prepared
from tests.data.toys import make_pictures

OFFICIAL = Splits(val=5000, test="official", labels_per_class=400)


def _public(name: str) -> str:
    """Where a public data set lies; the test is skipped where it does not."""
    root = os.environ.get("KD_DATA_ROOT")
    if root is None:
        pytest.skip("KD_DATA_ROOT names no folder with public data sets")
    folder = {"cifar10": "cifar10", "cifar100": "cifar100", "fashion_mnist": ""}[name]
    if not (Path(root) / (folder or "FashionMNIST")).exists():
        pytest.skip(f"KD_DATA_ROOT has no {name}")
    return str(Path(root) / folder)


def _example(member: type, tmp_path: Path) -> tuple[Dataset, Splits]:
    splits = Splits(val=0.2, test=0.2)
    if member is ImageFolder:
        root = make_pictures(tmp_path / "pictures", {"ant": 8, "bee": 9, "naïve cat": 10})
        return ImageFolder(root=str(root)), splits
    if member is CustomDataset:
        return CustomDataset(path="tests.data.toys:Stripes", args={"unlabelled": True}), splits
    if member in (Cifar10, Cifar100, FashionMnist):
        return member(root=_public(member.kind)), OFFICIAL
    return member(), Splits(val=0.2, test=0.2, labels_per_class=10)


@pytest.mark.parametrize("member", get_args(Dataset), ids=lambda member: member.kind)
def test_every_data_set_passes_the_battery(member: type, tmp_path: Path) -> None:
    dataset, splits = _example(member, tmp_path)
    check_dataset(dataset, tmp_path, splits, image_size=8, channels=1)


def test_a_pool_is_what_labels_per_class_leaves(tmp_path: Path) -> None:
    splits = Splits(val=0.2, test=0.2, labels_per_class=10)
    record = prepare(Digits(), splits, image_size=16, channels=1, seed=0, folder=tmp_path / "d")
    check_prepared(tmp_path / "d", num=1797, num_classes=10)
    assert record["splits"]["train"]["per_class"] == [10] * 10
    counts = {name: split["count"] for name, split in record["splits"].items()}
    assert counts == {"train": 100, "pool": 979, "val": 359, "test": 359}


def test_digits_are_scikit_learns_spread_over_all_grey_levels() -> None:
    from sklearn.datasets import load_digits

    raw = Digits().read()
    levels = np.round(np.asarray(raw.images).astype(float) * 16 / 255)
    assert np.array_equal(levels, load_digits().images)
    assert np.asarray(raw.images).max() == 255


@pytest.mark.parametrize(
    ("member", "shape", "first_labels", "names"),
    [
        (Cifar10, (60000, 32, 32, 3), [6, 9, 9, 4, 1], ("airplane", "truck")),
        (FashionMnist, (70000, 28, 28), [9, 0, 0, 3, 0], ("T-shirt/top", "Ankle boot")),
    ],
    ids=["cifar10", "fashion_mnist"],
)
def test_public_data_sets_are_the_published_ones(
    member: type, shape: tuple[int, ...], first_labels: list[int], names: tuple[str, str]
) -> None:
    raw = member(root=_public(member.kind)).read()
    assert raw.images.shape == shape
    assert raw.labels_N[:5].tolist() == first_labels
    assert (raw.class_names[0], raw.class_names[-1]) == names
    assert raw.is_test_N.sum() == 10000
    assert not raw.is_test_N[:-10000].any()
    # Pixels keep their values where nothing is to be resized.
    assert np.bincount(raw.labels_N[raw.is_test_N]).tolist() == [1000] * 10
