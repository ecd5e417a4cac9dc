"""Assign each image to a split: train, pool, val or test.

Within each class, images are ordered by a hash of the seed and the image's name: its file's path
below the root or, in an array, its position.  Test takes the first ones, val the next, train the
labels_per_class after that, and the pool the rest.  So splits are stratified, disjoint, the same
on every machine and with every library version, and nested: 20 labels per class include the 10 of
a smaller experiment.  Files that come or go change the split of few others.

Shape suffixes: N samples.
"""

import hashlib
from typing import TYPE_CHECKING, Literal

from kd.component import ConfigError, component, require
from kd.data.pictures import named

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kd.data.raw import Raw

NAMES = ("train", "pool", "val", "test")


@component
class Splits:
    """How the images are split into training, validation and test."""

    val: float | int = 0.1
    """Validation: a share in (0, 1) of the labelled images outside an official test split, or a
    count."""

    test: float | int | Literal["official"] = 0.1
    """Test: a share or count likewise, or the data set's own test split."""

    labels_per_class: int | None = None
    """Labelled training images per class; the rest go unlabelled into the pool.  None: all keep
    their labels, and only images without one are in the pool."""

    def __post_init__(self) -> None:
        for name, amount in (("val", self.val), ("test", self.test)):
            if amount == "official" and name == "test":
                continue
            is_share = isinstance(amount, float) and 0 < amount < 1
            is_count = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1
            require(
                is_share or is_count, name, amount, "a share in (0, 1) or a count of 1 or more"
            )
        require(
            self.labels_per_class is None or self.labels_per_class >= 1,
            "labels_per_class",
            self.labels_per_class,
            "1 or more, or null for all",
        )

    def assign(self, raw: "Raw", seed: int) -> "dict[str, NDArray[np.int64]]":
        """Split the images of `raw`.

        Args:
            raw: the data set; images labelled -1 go to the pool.
            seed: decides the order within each class.

        Returns:
            For each of train, pool, val and test, positions in the source.  They are ordered by
            hash, so that the first rows of a split are a random sample of it.

        Raises:
            ConfigError: there are too few images, a class would have no training, validation or
                test image, or `test` and the data set disagree on a test split.
        """
        import numpy as np

        num = len(raw.labels_N)
        is_test_N = self._official(raw)
        rank_N = np.array([_hash(seed, name) for name in _names(raw)])
        line_N = np.argsort(rank_N, kind="stable")
        lines = [
            [row for row in line_N[raw.labels_N[line_N] == label] if not is_test_N[row]]
            for label in range(len(raw.class_names))
        ]
        sizes = [len(line) for line in lines]
        tests = [0] * len(sizes) if self.test == "official" else _quota("test", self.test, sizes)
        vals = _quota("val", self.val, sizes)
        rows: dict[str, list[int]] = {
            "train": [],
            "val": [],
            "test": list(np.flatnonzero(is_test_N)),
        }
        faults = []
        for name, line, num_test, num_val in zip(raw.class_names, lines, tests, vals, strict=True):
            rest = line[num_test + num_val :]
            if not rest or (self.labels_per_class or 0) > len(rest):
                faults.append(
                    f"class {name!r} has {len(line)} images: {num_test} for test and {num_val} "
                    f"for val leave {max(0, len(line) - num_test - num_val)} to train on, but "
                    f"{self.labels_per_class or 1} needed; add images, or lower val, test or "
                    "labels_per_class"
                )
            rows["test"] += line[:num_test]
            rows["val"] += line[num_test : num_test + num_val]
            rows["train"] += rest[: self.labels_per_class]
        if faults:
            raise ConfigError(named(faults))
        self._check_every_class(raw, rows)
        taken = np.isin(np.arange(num), np.concatenate([rows[name] for name in rows]).astype(int))
        rows["pool"] = list(np.flatnonzero(~taken))
        return {
            name: np.array(sorted(rows[name], key=lambda row: rank_N[row]), dtype=np.int64)
            for name in NAMES
        }

    def _official(self, raw: "Raw") -> "NDArray[np.bool_]":
        """Which images are in the official test split that this configuration uses."""
        import numpy as np

        if self.test == "official":
            if raw.is_test_N is None:
                raise ConfigError(
                    "test is 'official', but this data set has no test split of its own; "
                    "give a share or a count"
                )
            return raw.is_test_N
        if raw.is_test_N is not None:
            # A share would train on images of the test split that others report results on.
            raise ConfigError(
                f"test is {self.test!r}, but this data set has a test split of its own; "
                "set test: official"
            )
        return np.zeros(len(raw.labels_N), dtype=np.bool_)

    def _check_every_class(self, raw: "Raw", rows: dict[str, list[int]]) -> None:
        for split, amount in (("val", self.val), ("test", self.test)):
            present = {int(raw.labels_N[row]) for row in rows[split]}
            if -1 in present:
                raise ConfigError("the official test split has images without a label")
            remedy = "" if amount == "official" else f", raise {split}"
            faults = [
                f"class {name!r} has no image in {split} ({len(rows[split])} images); "
                f"add images{remedy} or leave the class out"
                for label, name in enumerate(raw.class_names)
                if label not in present
            ]
            if faults:
                raise ConfigError(named(faults))


def _names(raw: "Raw") -> list[str]:
    """What tells each image from the others, wherever the source is."""
    if raw.root is None or not raw.files:
        return [str(row) for row in range(len(raw.labels_N))]
    return [path.relative_to(raw.root).as_posix() for path in raw.files]


def _hash(seed: int, name: str) -> int:
    """A 63-bit number that depends only on its arguments."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) >> 1


def _quota(name: str, amount: float | int | str, sizes: list[int]) -> list[int]:
    """Split `amount` in proportion to the classes' sizes (largest remainders, exact total)."""
    num = sum(sizes)
    total = int(amount * num + 0.5) if isinstance(amount, float) else int(amount)
    if total >= num:
        raise ConfigError(
            f"{name} is {amount!r}, which asks for {total} of {num} images; lower it"
        )
    quotas = [total * size // num for size in sizes]
    # Integer remainders, so that rounding never decides between two classes.
    by_remainder = sorted(range(len(sizes)), key=lambda label: -(total * sizes[label] % num))
    for label in by_remainder[: total - sum(quotas)]:
        quotas[label] += 1
    return quotas
