"""The user's own images: one folder per class."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kd.component import ConfigError, component
from kd.data.pictures import named, read_picture
from kd.data.raw import Raw

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_LITTER = ("Thumbs.db", "desktop.ini")
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@component
class ImageFolder:
    """Images of any size under root/<class name>/, at any depth; the folders name the classes."""

    root: str
    """Folder that holds one folder per class."""

    kind: Literal["image_folder"] = "image_folder"

    def read(self) -> Raw:
        """List the images; each is decoded when it is accessed."""
        import numpy as np

        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise ConfigError(
                f"root {str(root)!r} is not a folder; name one with a folder per class"
            )
        entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        folders = [path for path in entries if path.is_dir()]
        if len(folders) < 2:
            raise ConfigError(
                f"root {str(root)!r} holds {len(folders)} class folders; "
                "make one per class, at least two"
            )
        if {folder.name.lower() for folder in folders} <= _SPLITS:
            raise ConfigError(
                f"root {str(root)!r} holds {', '.join(folder.name for folder in folders)}, which "
                "are splits, not classes; merge them into one folder per class, which `splits` "
                "divides, or keep your test split by a custom data set (docs/data.md)"
            )
        files_by_class = [_files(folder) for folder in folders]
        files = tuple(path for files in files_by_class for path in files)
        if faults := _faults(entries, files, dict(zip(folders, files_by_class, strict=True))):
            raise ConfigError(named(faults))
        counts = [len(files) for files in files_by_class]
        return Raw(
            images=_Decoded(files),
            labels_N=np.repeat(np.arange(len(folders), dtype=np.int64), counts),
            class_names=tuple(folder.name for folder in folders),
            root=root,
            files=files,
        )


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES


def _files(folder: Path) -> list[Path]:
    """The files of one class, and links, in a fixed order, without hidden and system files."""
    if folder.is_symlink():  # which is refused: what it leads to may take minutes to list
        return []
    return sorted(
        path
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir())
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name not in _LITTER
    )


def _faults(
    entries: list[Path], files: tuple[Path, ...], by_folder: dict[Path, list[Path]]
) -> list[str]:
    """Misplaced images, files that are not images, links to no file, and empty classes."""
    lost = [path for path in entries if _is_picture(path)]
    links = [path for path in (*entries, *files) if path.is_symlink() and not path.is_file()]
    unknown = [path for path in files if path not in links and not _is_picture(path)]
    empty = [folder for folder, found in by_folder.items() if not found and folder not in links]
    types = " ".join(_SUFFIXES)
    return [
        *(f"{path} is outside of the class folders; move it into one" for path in lost),
        *(
            f"{path} is a link to nothing or to a folder, in which DVC would notice no change; "
            "replace it by what it stands for, or remove it"
            for path in links
        ),
        *(
            f"{path} is not an image of a known type ({types}); convert or remove it"
            for path in unknown
        ),
        *(f"class {it.name!r} has no images in {it}; add some or remove it" for it in empty),
    ]


class _Decoded:
    """A sequence that decodes each image when it is accessed."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> "NDArray[np.uint8]":
        return read_picture(self.files[row])
