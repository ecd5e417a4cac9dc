"""Convert any data set to the compact form on disk: uint8 arrays that can be memory-mapped.

    <folder>/raw/                     the source as obtained
    <folder>/{train,pool,val,test}/   images.npy labels.npy indices.npy
    <folder>/data.json                the record

Shape suffixes: N samples, H W image.
"""

import csv
import dataclasses
import hashlib
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.component import ConfigError, require
from kd.data.pictures import named, to_square
from kd.data.raw import UNLABELLED, Raw
from kd.data.splits import NAMES, Splits
from kd.disk import sha256

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kd.data import Dataset

_CHUNK = 64  # images in memory at once: 10 MB at 224 x 224 x 3
_DARK = 16  # what is left of 12 bits, if 16 are divided by 256


def prepare(
    dataset: "Dataset",
    splits: Splits,
    *,
    image_size: int,
    channels: int,
    seed: int,
    folder: Path,
    raw: Raw | None = None,
) -> dict[str, Any]:
    """Read, resize, split and write a data set.

    Everything is written beside `folder` first and moved into place when complete, data.json
    last: an interrupted run leaves no record, so partial data is never mistaken for complete.
    Other files in `folder` are left alone.

    Args:
        dataset: where the images come from.
        splits: how they are split.
        image_size: side of the square images, in pixels.
        channels: 1 (grey) or 3 (colour).
        seed: decides the splits.
        folder: where the prepared data goes.
        raw: what `dataset` reads, if it was read already.

    Returns:
        The record, as in data.json.

    Raises:
        ConfigError: the data cannot be read, or not split as configured.
        OSError: the disk is full or not writable.
    """
    require(image_size >= 1, "image_size", image_size, "1 or more")
    require(channels in (1, 3), "channels", channels, "1 (grey) or 3 (colour)")
    raw = raw or dataset.read()
    rows_by_split = splits.assign(raw, seed)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_raw(raw, partial / "raw")
        faults: dict[int, str] = {}
        for name, rows_N in rows_by_split.items():
            labelled = name != "pool"
            faults |= _write_split(partial / name, raw, rows_N, image_size, channels, labelled)
        if faults:  # those of images in an array are identical
            raise ConfigError(named(list(dict.fromkeys(faults[row] for row in sorted(faults)))))
        record = _record(dataset, splits, raw, image_size, channels, seed, partial)
        (partial / "data.json").write_text(
            json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8"
        )
        _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def dark_warnings(folder: Path, raw: Raw) -> list[str]:
    """A warning if pictures are so dark that their grey levels were probably lost.

    Args:
        folder: what `prepare` wrote.
        raw: the data set that it was made from.
    """
    import numpy as np

    if not raw.files:  # arrays are bytes already
        return []
    files = [folder / name / "images.npy" for name in ("train", "pool")]
    brightest = max(int(np.load(file, mmap_mode="r").max(initial=0)) for file in files)
    if brightest >= _DARK:
        return []
    return [
        f"warning: no pixel of the training images is brighter than {brightest} of 255; if they "
        "are 12-bit greys in 16-bit files, of which the upper 8 bits are kept, scale them first"
    ]


def _write_raw(raw: Raw, folder: Path) -> None:
    """Save the source: its arrays, or a list of its files (DVC versions the files)."""
    import numpy as np

    folder.mkdir(parents=True)
    np.save(folder / "labels.npy", raw.labels_N)
    (folder / "classes.json").write_text(
        json.dumps(raw.class_names, ensure_ascii=False) + "\n", "utf-8"
    )
    if raw.is_test_N is not None:
        np.save(folder / "is_test.npy", raw.is_test_N)
    if not raw.files:
        np.save(folder / "images.npy", np.asarray(raw.images))
        return
    assert raw.root is not None
    with (folder / "files.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "bytes", "sha256"])
        for path in raw.files:
            relative = path.relative_to(raw.root).as_posix()
            table.writerow([relative, path.stat().st_size, sha256(path)])


def _write_split(
    folder: Path, raw: Raw, rows_N: "NDArray[np.int64]", size: int, channels: int, labelled: bool
) -> dict[int, str]:
    """Write one split, holding one chunk of images in memory; return the faults by row."""
    import numpy as np

    folder.mkdir()
    labels_N = raw.labels_N[rows_N] if labelled else np.full(len(rows_N), UNLABELLED)
    np.save(folder / "labels.npy", labels_N.astype(np.int64))
    np.save(folder / "indices.npy", rows_N)
    shape = (len(rows_N), size, size, channels)
    faults: dict[int, str] = {}

    def square_of(row: int) -> "NDArray[np.uint8]":
        try:
            return to_square(raw.images[row], size, channels)
        except ConfigError as error:  # reported together, not one per run
            faults[row] = str(error)
            return np.zeros(shape[1:], np.uint8)

    # A plain file, not a writable memory map: on a full disk a map kills the process.
    with (folder / "images.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        with ThreadPoolExecutor() as pool:
            # Decoding releases the GIL; for arrays, threads would cost more than they save.
            each = pool.map if raw.files else map
            for start in range(0, len(rows_N), _CHUNK):
                for square in each(square_of, rows_N[start : start + _CHUNK]):
                    file.write(square.tobytes())
    return faults


def _record(
    dataset: "Dataset", splits: Splits, raw: Raw, size: int, channels: int, seed: int, folder: Path
) -> dict[str, Any]:
    mean, std = _mean_std([folder / name / "images.npy" for name in ("train", "pool")])
    content = {
        "class_names": list(raw.class_names),
        "image_size": size,
        "channels": channels,
        "splits": {name: _describe(folder / name, len(raw.class_names)) for name in NAMES},
    }
    # The hash leaves out the source: the same images from another folder are equal.
    data_hash = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {
        "dataset": dataclasses.asdict(dataset),
        "split_by": {**dataclasses.asdict(splits), "seed": seed},
        **content,
        "mean": mean,
        "std": std,
        "data_hash": data_hash,
    }


def _describe(folder: Path, num_classes: int) -> dict[str, Any]:
    """Size, images per class (by stored labels) and hash of a written split."""
    import numpy as np

    labels_N = np.load(folder / "labels.npy")
    files = [sha256(folder / f"{name}.npy") for name in ("images", "labels", "indices")]
    return {
        "count": len(labels_N),
        "per_class": np.bincount(labels_N[labels_N >= 0], minlength=num_classes).tolist(),
        "sha256": hashlib.sha256("".join(files).encode()).hexdigest(),
    }


def _mean_std(paths: list[Path]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all images of the files, in [0, 1] units.

    The sums are integers, so nothing is rounded before the final division.
    """
    import numpy as np

    num = 0
    sums: Any = 0  # arrays of Python's integers from the first addition on
    squares: Any = 0
    for path in paths:
        images_NHWC = np.load(path, mmap_mode="r")
        for start in range(0, len(images_NHWC), _CHUNK):
            chunk = images_NHWC[start : start + _CHUNK].reshape(-1, images_NHWC.shape[3])
            num += len(chunk)
            sums += chunk.sum(0, dtype=np.uint64).astype(object)
            squares += (chunk.astype(np.uint16) ** 2).sum(0, dtype=np.uint64).astype(object)
    means = [total / (255 * num) for total in sums]
    variances = [num * square - total**2 for total, square in zip(sums, squares, strict=True)]
    if 0 in variances:
        raise ConfigError(
            f"channel {variances.index(0)} is the same in every pixel of the training images, "
            "so it holds no information; check the images, and data.channels"
        )
    return means, [math.sqrt(variance) / (255 * num) for variance in variances]


def _move(partial: Path, folder: Path) -> None:
    """Replace `folder`'s parts by `partial`'s; the record is deleted first and moved last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").unlink(missing_ok=True)
    for name in ("raw", *NAMES):
        shutil.rmtree(folder / name, ignore_errors=True)
        (partial / name).rename(folder / name)
    (partial / "data.json").rename(folder / "data.json")
