import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from kd.bundle import classify
from kd.component import ConfigError
from kd.data.pictures import read_picture, to_square

RNG = np.random.default_rng(0)
FORM = {"picture": {"width": 4, "height": 4, "channels": 3}}


def _save(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "shape"),
    [("1", (4, 6)), ("L", (4, 6)), ("RGB", (4, 6, 3)), ("RGBA", (4, 6, 4)), ("LA", (4, 6, 4)),
     ("P", (4, 6, 3))],
)  # fmt: skip
def test_every_mode_of_png_is_read(mode: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    image = read_picture(_save(tmp_path / "x.png", Image.new("RGB", (6, 4), "red").convert(mode)))
    assert image.dtype == np.uint8
    assert image.shape == shape


def test_cmyk_is_read_as_colour(tmp_path: Path) -> None:
    assert read_picture(_save(tmp_path / "x.jpg", Image.new("CMYK", (6, 4)))).shape == (4, 6, 3)


def test_sixteen_bits_keep_the_upper_eight(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    image = read_picture(_save(tmp_path / "x.png", Image.fromarray(values)))
    assert image.tolist() == [[0, 0, 1, 255]]


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "x.tiff", Image.new("F", (3, 3)))
    with pytest.raises(ConfigError, match="8 or 16 bits"):
        read_picture(path)


def test_a_picture_taken_sideways_is_turned_upright(tmp_path: Path) -> None:
    picture = Image.fromarray(RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn right by 90 degrees
    path = _save(tmp_path / "x.png", picture, exif=exif)
    assert np.array_equal(read_picture(path), np.rot90(np.asarray(picture), -1))


def test_a_picture_to_be_turned_whose_exif_is_damaged_is_named(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x0103] = 6, 1
    path = _save(tmp_path / "broken.jpg", Image.new("RGB", (6, 4)), exif=exif)
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"\x01\x03\x00\x03", b"\x01\x03\x00\x02"))
    assert path.read_bytes() != sound
    with pytest.raises(ConfigError, match=r"broken\.jpg cannot be read as an image"):
        read_picture(path)


@pytest.mark.parametrize(
    "read", [read_picture, lambda path: classify.read(str(path), FORM)], ids=["kd", "bundle"]
)
def test_postscript_under_a_pictures_name_is_given_to_no_program(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "gs"  # Ghostscript's name
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # what Pillow remembers of PATH
    path = tmp_path / "x.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises((ConfigError, UnidentifiedImageError), match="cannot identify"):
        read(path)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["bmp", "gif", "jpeg", "mpo", "png", "ppm", "tiff", "webp"])
def test_what_a_file_holds_counts_and_not_its_name(kind: str, tmp_path: Path) -> None:
    path = _save(tmp_path / "x.jpg", Image.new("RGB", (6, 4)), format=kind)
    assert read_picture(path).shape == (4, 6, 3)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_corrupt_picture_is_named(content: bytes | None, tmp_path: Path) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = _save(tmp_path / "broken.png", noise)
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ConfigError, match=r"broken\.png cannot be read as an image"):
        read_picture(path)


def test_an_image_that_fits_is_not_touched() -> None:
    image = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert to_square(image, 8, 3) is image


def test_grey_becomes_colour_by_repetition_and_back() -> None:
    grey = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
    colour = to_square(grey, 8, 3)
    assert np.array_equal(colour, np.repeat(grey[:, :, None], 3, axis=2))
    assert np.array_equal(to_square(colour, 8, 1)[:, :, 0], grey)


def test_colour_becomes_grey_by_luminance() -> None:
    image = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    luminance = image @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(to_square(image, 8, 1)[:, :, 0] - luminance).max() <= 0.501


def test_transparency_is_laid_over_white() -> None:
    image = np.zeros((2, 2, 4), np.uint8)
    image[0, 0, 3] = 255
    image[0, 1, 3] = 128
    assert to_square(image, 2, 1)[:, :, 0].tolist() == [[0, 127], [255, 255]]


def test_the_centre_is_kept_of_what_is_not_square() -> None:
    image = np.zeros((4, 12), np.uint8)
    image[:, 4:8] = RNG.integers(1, 256, (4, 4))
    assert np.array_equal(to_square(image, 4, 1)[:, :, 0], image[:, 4:8])
    assert np.array_equal(to_square(image.T, 4, 1)[:, :, 0], image.T[4:8])


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    small = to_square(checkers.astype(np.uint8), 8, 1)[1:-1, 1:-1]
    assert np.abs(small.astype(int) - 127.5).max() < 3
