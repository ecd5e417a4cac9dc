"""Public data sets that torchvision can download, verify and parse."""

import hashlib
from pathlib import Path
from typing import Any, Literal

from kd.component import ConfigError, component
from kd.data.raw import Raw

# torchvision verifies Fashion-MNIST's archives after a download, never the files it reads.
_FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


@component
class Cifar10:
    """CIFAR-10: 50,000 + 10,000 colour images of 32 x 32 in 10 classes (Krizhevsky 2009)."""

    root: str
    """Folder that holds, or will hold, cifar-10-batches-py."""

    kind: Literal["cifar10"] = "cifar10"
    download: bool = False
    """Fetch what is missing."""

    def read(self) -> Raw:
        """Read both official parts, whose MD5 torchvision checks."""
        return _read("CIFAR10", self.root, self.download)


@component
class Cifar100:
    """CIFAR-100: 50,000 + 10,000 colour images of 32 x 32 in 100 classes (Krizhevsky 2009)."""

    root: str
    """Folder that holds, or will hold, cifar-100-python."""

    kind: Literal["cifar100"] = "cifar100"
    download: bool = False
    """Fetch what is missing."""

    def read(self) -> Raw:
        """Read both official parts, whose MD5 torchvision checks."""
        return _read("CIFAR100", self.root, self.download)


@component
class FashionMnist:
    """Fashion-MNIST: 60,000 + 10,000 grey images of 28 x 28 in 10 classes (Xiao et al. 2017)."""

    root: str
    """Folder that holds, or will hold, FashionMNIST/raw."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"
    download: bool = False
    """Fetch what is missing."""

    def read(self) -> Raw:
        """Read both official parts and check their MD5."""
        raw = _read("FashionMNIST", self.root, self.download)
        for name, md5 in _FASHION_MNIST_MD5.items():
            path = Path(self.root).expanduser() / "FashionMNIST" / "raw" / name
            if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5:
                raise ConfigError(
                    f"{path} is corrupt (its MD5 is not {md5}); delete it, and "
                    "set download: true or put the right file there"
                )
        return raw


def _read(name: str, root: str, download: bool) -> Raw:
    """Read the training and test parts of torchvision's data set `name`, in this order."""
    import numpy as np

    parts = [_open(name, root, download, train) for train in (True, False)]
    num_train, num_test = (len(part.data) for part in parts)
    return Raw(
        images=np.concatenate([np.asarray(part.data) for part in parts]),
        labels_N=np.concatenate([np.asarray(part.targets, dtype=np.int64) for part in parts]),
        class_names=tuple(parts[0].classes),
        is_test_N=np.arange(num_train + num_test) >= num_train,
    )


def _open(name: str, root: str, download: bool, train: bool) -> Any:
    """Open one part with torchvision, turning its errors into one that names the remedy."""
    import warnings

    import torchvision

    folder = Path(root).expanduser()
    try:
        with warnings.catch_warnings():
            # CIFAR's pickles were written by an old numpy that described dtypes differently.
            warnings.filterwarnings("ignore", message=".*align should be passed")
            return getattr(torchvision.datasets, name)(folder, train=train, download=download)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        remedy = (
            "check the network, or fetch the files elsewhere and put them there"
            if download
            else "set download: true, or put its files there"
        )
        raise ConfigError(
            f"root {str(folder)!r}: cannot read {name} ({error}); {remedy}"
        ) from error
