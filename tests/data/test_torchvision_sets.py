"""What is missing or corrupt; the sound files are read in test_datasets.py."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from kd.component import ConfigError
from kd.data import Cifar10, Cifar100, FashionMnist


@pytest.mark.parametrize("member", [Cifar10, Cifar100, FashionMnist])
def test_missing_files_are_refused_with_root_and_remedy(member: type, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"root '{tmp_path}'.*set download: true"):
        member(root=str(tmp_path)).read()


def test_a_failed_download_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(ConfigError, match=r"unreachable.*check the network"):
        Cifar10(root=str(tmp_path), download=True).read()


def test_corrupt_cifar_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("test_batch", "batches.meta", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(b"evil")
    with pytest.raises(ConfigError, match="corrupted"):
        Cifar10(root=str(tmp_path)).read()


def test_fashion_mnist_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    """Its shape is right, so that only the checksum can tell."""
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, num in (("train", 4), ("t10k", 2)):
        images = np.array([0x803, num, 28, 28], ">i4").tobytes() + bytes(num * 784)
        labels = np.array([0x801, num], ">i4").tobytes() + bytes(num)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(ConfigError, match="train-images-idx3-ubyte is corrupt"):
        FashionMnist(root=str(tmp_path)).read()
    (folder / "train-images-idx3-ubyte").write_bytes(b"\x00\x00")
    with pytest.raises(ConfigError, match="FashionMNIST"):
        FashionMnist(root=str(tmp_path)).read()
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="not found"):
        FashionMnist(root=str(tmp_path)).read()
