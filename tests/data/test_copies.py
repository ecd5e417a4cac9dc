from pathlib import Path

import numpy as np

from kd.data import CustomDataset, Raw, Splits, copy_warnings, prepare
from kd.data.copies import copies


def test_equal_pixels_in_two_splits_are_found_whatever_their_class(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8)
    raw = Raw(images=images, labels_N=np.arange(40) % 2, class_names=("a", "b"))

    def write() -> None:
        splits = Splits(val=8, test=8, labels_per_class=4)
        named = CustomDataset(path="tests.data.toys:Stripes")
        options = {"image_size": 4, "channels": 1, "seed": 0, "folder": tmp_path / "d"}
        prepare(named, splits, **options, raw=raw)

    write()
    assert copies(tmp_path / "d") == {"val": [], "test": []}
    rows = {
        name: np.load(tmp_path / "d" / name / "indices.npy").tolist()
        for name in ("train", "pool", "val", "test")
    }
    images[rows["test"][0]] = images[rows["train"][1]]
    images[rows["test"][3]] = images[rows["pool"][2]]
    images[rows["val"][1]] = images[rows["test"][5]]
    images[rows["train"][3]] = images[rows["train"][0]]
    write()
    assert copies(tmp_path / "d") == {
        "val": [],
        "test": [(rows["test"][0], rows["train"][1]), (rows["test"][3], rows["pool"][2])],
    }
    (warning,) = copy_warnings(tmp_path / "d", raw)
    assert "some images of test (2) are in train or pool, too" in warning
    assert f"{rows['test'][0]} = {rows['train'][1]}" in warning
