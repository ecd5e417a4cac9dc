"""Batches against plain loops, over every view.

Shape suffixes: N samples, H W image, C channels last.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.component import ConfigError
from kd.data import Augment, CustomDataset, Images, Splits, order_for, prepare

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def _images(height: int, width: int, channels: int, augment: Augment) -> Images:
    generator = torch.Generator().manual_seed(0)
    shape = (5, height, width, channels)
    return Images(
        pixels_NHWC=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        labels_N=torch.arange(5) % 2,
        mean=(0.3, 0.45, 0.6)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
        augment=augment,
    )


def _slow_view(image_HWC: np.ndarray, dy: int, dx: int, flip: bool) -> np.ndarray:
    """One view by plain loops: shift with black coming in, then mirror."""
    height, width, _ = image_HWC.shape
    view = np.zeros_like(image_HWC)
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                view[y, width - 1 - x if flip else x] = image_HWC[y + dy, x + dx]
    return view


def _slow_normalise(view_HWC: np.ndarray, images: Images) -> Tensor:
    """In float32 scalars, each step rounded: what `batch` promises bit by bit."""
    mean = [np.float32(255 * m) for m in images.mean]
    scale = [np.float32(1 / (255 * s)) for s in images.std]
    height, width, channels = view_HWC.shape
    normal = np.empty((channels, height, width), np.float32)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                normal[c, y, x] = (np.float32(view_HWC[y, x, c]) - mean[c]) * scale[c]
    return torch.from_numpy(normal)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("height", "width", "channels", "augment"),
    [
        (6, 6, 1, Augment(shift=2, flip=True)),
        (5, 4, 3, Augment(shift=1, flip=True)),
        (4, 4, 3, Augment(flip=True)),
        (3, 3, 1, Augment(shift=4)),  # further than the image is wide: all black
        (3, 3, 3, Augment()),
    ],
)
def test_every_view_of_every_image_equals_the_slow_one(
    height: int, width: int, channels: int, augment: Augment, device: str
) -> None:
    images = _images(height, width, channels, augment)
    there = dataclasses.replace(
        images, pixels_NHWC=images.pixels_NHWC.to(device), labels_N=images.labels_N.to(device)
    )
    views_V = torch.arange(augment.num_views)
    for row in range(len(images)):
        batch = there.batch(torch.full_like(views_V, row), views_V)
        assert batch.device.type == device
        for view, (dy, dx, flip) in enumerate(zip(*augment.decode(views_V), strict=True)):
            slow = _slow_view(images.pixels_NHWC[row].numpy(), int(dy), int(dx), bool(flip))
            assert torch.equal(batch[view].cpu(), _slow_normalise(slow, images))


@pytest.mark.parametrize(("side", "num"), [(8, 512), (32, 512), (64, 256), (224, 20), (2000, 1)])
def test_the_larger_images_are_the_fewer_are_looked_at_at_once(side: int, num: int) -> None:
    images = _images(2, 2, 1, Augment())
    large = images.pixels_NHWC[:1, :1, :1].expand(1, side, side, 1)
    one = dataclasses.replace(images, pixels_NHWC=large, labels_N=images.labels_N[:1])
    assert one.at_once == num


def test_images_are_named_by_every_pixel_their_order_and_their_shape() -> None:
    images = _images(4, 6, 1, Augment())
    pixels = images.pixels_NHWC
    changed = pixels.clone()
    changed[4, 3, 5, 0] += 1

    def named(pixels_NHWC: Tensor, *beyond: Tensor) -> str:
        labels_N = torch.zeros(sum(map(len, (pixels_NHWC, *beyond))), dtype=torch.int64)
        channels = pixels_NHWC.shape[3]
        normal = {"mean": (0.3,) * channels, "std": (0.2,) * channels}
        given = {"pixels_NHWC": pixels_NHWC, "beyond_NHWC": beyond, "labels_N": labels_N}
        return Images(**given, **normal).identity

    assert named(pixels.clone()) == named(pixels[:2], pixels[2:]) == images.identity
    others = [
        changed,
        pixels.flip(0),
        pixels[:4],
        pixels.view(5, 6, 4, 1),
        pixels.view(5, 4, 2, 3),
    ]
    assert len({images.identity, *map(named, others)}) == 1 + len(others)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_normalised_channels_last_and_in_the_order_asked(channels: int) -> None:
    images = _images(6, 6, channels, Augment(shift=2))
    rows_B = torch.tensor([3, 0, 3, 4])
    batch = images.batch(rows_B)
    assert batch.dtype == torch.float32
    assert batch.shape == (4, channels, 6, 6)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    exact = images.pixels_NHWC[rows_B].double() / 255 - torch.tensor(images.mean).double()
    exact /= torch.tensor(images.std).double()
    torch.testing.assert_close(batch.double(), exact.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    identity = torch.full_like(rows_B, images.augment.identity)
    assert torch.equal(images.batch(rows_B, identity), batch)
    assert images.image_shape == (channels, 6, 6)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    prepare(
        CustomDataset(path="tests.data.toys:Stripes"),
        Splits(val=0.2, test=0.2, labels_per_class=5),
        image_size=8, channels=1, seed=0, folder=tmp_path / "data",
    )  # fmt: skip
    return tmp_path / "data"


def test_one_split_is_mapped_not_read(prepared: Path) -> None:
    images = Images.load(prepared, "pool")
    path = prepared / "pool" / "images.npy"
    with path.open("r+b") as file:  # a map sees what its file becomes
        file.seek(-1, 2)
        file.write(bytes([77]))
    assert images.pixels_NHWC[-1, -1, -1, -1] == 77
    images.pixels_NHWC[0] = 5  # and its own changes never reach the file
    assert not (np.load(path)[0] == 5).all()


def test_train_and_pool_are_joined_in_order(prepared: Path) -> None:
    joined = Images.load(prepared, ("train", "pool"), augment=Augment(flip=True))
    train, pool = Images.load(prepared, "train"), Images.load(prepared, "pool")
    assert len(joined) == len(train) + len(pool) == 36
    assert torch.equal(joined.pixels_NHWC, torch.cat([train.pixels_NHWC, pool.pixels_NHWC]))
    assert (joined.labels_N >= 0).sum() == len(train) == 10
    assert (joined.mean, joined.std) == (train.mean, train.std)
    assert joined.augment.num_views == 2


def test_an_epoch_shows_every_image_once(prepared: Path) -> None:
    images = Images.load(prepared, ("train", "pool"), augment=Augment(shift=1, flip=True))
    views_N = images.augment.views_for(0, 0, len(images))
    order_N = order_for(0, 0, len(images))
    shown = torch.cat([images.batch(rows, views_N[rows]) for rows in order_N.split(7)])
    alone = torch.cat([images.batch(row[None], views_N[row][None]) for row in order_N])
    assert torch.equal(shown, alone)


def test_data_that_is_not_there_or_damaged_is_refused(prepared: Path) -> None:
    with pytest.raises(ConfigError, match="run stage data"):
        Images.load(prepared / "nowhere", "train")
    path = prepared / "val" / "images.npy"
    for damaged in (path.read_bytes()[:200], b""):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="holds no prepared data"):
            Images.load(prepared, "val")


def test_splits_too_large_to_be_held_are_read_as_they_are_needed(prepared: Path) -> None:
    augment = Augment(shift=1, flip=True)
    held = Images.load(prepared, ("train", "pool"), augment=augment)
    mapped = Images.load(prepared, ("train", "pool"), augment=augment, held_bytes=0)
    assert len(mapped.beyond_NHWC) == 1
    assert len(mapped) == len(held)
    assert mapped.identity == held.identity
    assert (
        dataclasses.replace(mapped, source="").identity
        == dataclasses.replace(held, source="").identity
    )
    indices_B = torch.randperm(len(held))
    views_B = torch.randint(augment.num_views, (len(held),))
    assert torch.equal(mapped.batch(indices_B, views_B), held.batch(indices_B, views_B))
    assert torch.equal(mapped.batch(indices_B[:1]), held.batch(indices_B[:1]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"pixels_NHWC": torch.rand(5, 4, 6, 1)},
            r"pixels_NHWC is 'Tensor \(5, 4, 6, 1\) ",
        ),
        ({"pixels_NHWC": torch.zeros(5, 4, 6, dtype=torch.uint8)}, "it must be a uint8 tensor"),
        ({"pixels_NHWC": np.zeros((5, 4, 6, 1), np.uint8)}, "pixels_NHWC is 'ndarray"),
        ({"labels_N": torch.arange(4)}, r"labels_N is .*\(4,\).* must be a tensor of 5 whole num"),
        ({"labels_N": torch.arange(5.0)}, "float32'; it must be a tensor of 5 whole numbers"),
        ({"labels_N": torch.eye(5, dtype=torch.int64)}, "one for each image"),
        ({"mean": 0.3}, "mean is 0.3; it must be a tuple of 1 numbers"),
        ({"std": (0.3, 0.3, 0.3)}, "std is .*; it must be a tuple of 1 numbers, one for each"),
        ({"std": (0.0,)}, "std is .*; it must be above 0"),
    ],
)
def test_what_are_no_labelled_images_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(_images(4, 6, 1, Augment()), **change)
