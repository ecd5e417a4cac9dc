import os
import shutil
from pathlib import Path

import pytest

from kd.component import ConfigError
from kd.data import ImageFolder
from tests.data.toys import make_pictures


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures", {"bee": 2, "Ant": 3})


def test_folders_name_the_classes_and_pictures_come_in_a_fixed_order(root: Path) -> None:
    (root / "bee" / "garden").mkdir()
    (root / "bee" / "1.jpg").rename(root / "bee" / "garden" / "1.JPG")
    (root / ".DS_Store").touch()
    (root / "bee" / ".hidden").touch()
    (root / "bee" / ".ipynb_checkpoints").mkdir()
    shutil.copy(root / "bee" / "0.jpg", root / "bee" / ".ipynb_checkpoints")
    (root / "bee" / "Thumbs.db").touch()
    (root / "README.txt").touch()
    raw = ImageFolder(root=str(root)).read()
    assert raw.class_names == ("Ant", "bee")
    assert raw.labels_N.tolist() == [0, 0, 0, 1, 1]
    assert [path.relative_to(root).as_posix() for path in raw.files][3:] == [
        "bee/0.jpg", "bee/garden/1.JPG",
    ]  # fmt: skip
    assert raw.images[2].shape == (12, 14, 4)


def test_a_class_without_picture_is_named(root: Path) -> None:
    (root / "cat").mkdir()
    with pytest.raises(ConfigError, match="class 'cat' has no images"):
        ImageFolder(root=str(root)).read()


def test_a_picture_outside_every_class_is_named(root: Path) -> None:
    (root / "bee" / "1.jpg").rename(root / "lost.jpg")
    with pytest.raises(ConfigError, match=r"lost\.jpg is outside of the class folders"):
        ImageFolder(root=str(root)).read()


def test_a_file_of_an_unknown_type_is_named_instead_of_dropped(root: Path) -> None:
    (root / "bee" / "phone.heic").touch()
    with pytest.raises(ConfigError, match=r"phone\.heic is not an image of a known type"):
        ImageFolder(root=str(root)).read()


def test_a_link_that_would_drop_images_or_hide_changes_from_dvc_is_named(root: Path) -> None:
    (root / "bee" / "hive").symlink_to(root / "Ant", target_is_directory=True)
    (root / "bee" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "unmounted").symlink_to(root / "nowhere", target_is_directory=True)
    (root / "wasp").symlink_to(root.parent, target_is_directory=True)  # which is not listed
    (root.parent / "notes.txt").touch()
    with pytest.raises(ConfigError) as refused:
        ImageFolder(root=str(root)).read()
    named = [line.partition(" is a link to nothing")[0] for line in str(refused.value).split("\n")]
    wrong = ("unmounted", "wasp", "bee/gone.jpg", "bee/hive")
    assert named == [f"{root}/{name}" for name in wrong]


def test_the_root_and_single_files_may_be_links(root: Path) -> None:
    (root / "Ant" / "more.jpg").symlink_to(root / "bee" / "0.jpg")
    (root.parent / "link").symlink_to(root, target_is_directory=True)
    raw = ImageFolder(root=str(root.parent / "link")).read()
    assert raw.labels_N.tolist() == [0, 0, 0, 0, 1, 1]


def test_a_folder_for_each_split_is_not_taken_for_classes(tmp_path: Path) -> None:
    for split in ("train", "Val", "test"):
        make_pictures(tmp_path / split, {"ant": 2, "bee": 2})
    with pytest.raises(ConfigError, match="holds Val, test, train, which are splits, not classes"):
        ImageFolder(root=str(tmp_path)).read()


@pytest.mark.parametrize("where", [b"b\xff/0.jpg", b"bee/\xff.jpg"])
def test_a_name_that_is_no_text_is_refused(where: bytes, root: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(root) + b"/" + where))
    path.parent.mkdir(exist_ok=True)
    shutil.copy(root / "bee" / "0.jpg", path)
    with pytest.raises(ConfigError, match="is not a string of UTF-8; rename it"):
        ImageFolder(root=str(root)).read()


def test_what_is_wrong_is_named_in_one_run(root: Path) -> None:
    (root / "lost.jpg").touch()
    (root / "cat").mkdir()
    for number in range(30):
        (root / "bee" / f"{number:02}.heic").touch()
    with pytest.raises(ConfigError) as refused:
        ImageFolder(root=str(root)).read()
    lines = str(refused.value).splitlines()
    assert lines[0] == f"{root}/lost.jpg is outside of the class folders; move it into one"
    assert lines[19].startswith(f"{root}/bee/18.heic is not an image of a known type")
    assert lines[20:] == ["and 12 more"]


def test_a_missing_root_or_a_single_class_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        ImageFolder(root=str(root / "nowhere")).read()
    (root / "bee").rename(root.parent / "bee")
    with pytest.raises(ConfigError, match="holds 1 class folders"):
        ImageFolder(root=str(root)).read()
