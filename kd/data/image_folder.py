"""People's own pictures: one folder for each class."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kd.component import ConfigError, component
from kd.data.pictures import read_picture
from kd.data.raw import Raw

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_LITTER = ("Thumbs.db", "desktop.ini")


@component
class ImageFolder:
    """Pictures of any size under root/<class name>/, at any depth; folders name the classes."""

    root: str
    """Folder that holds one folder for each class."""

    kind: Literal["image_folder"] = "image_folder"

    def read(self) -> Raw:
        """List the pictures; each is decoded when it is asked for."""
        import numpy as np

        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise ConfigError(
                f"root {str(root)!r} is not a folder; name one that holds your classes"
            )
        entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        stray = next((path for path in entries if path.suffix.lower() in _SUFFIXES), None)
        if stray is not None:
            raise ConfigError(f"{stray} lies beside the class folders; move it into its class")
        folders = [path for path in entries if path.is_dir()]
        if len(folders) < 2:
            raise ConfigError(
                f"root {str(root)!r} holds {len(folders)} class folders; "
                "make one for each class, two at least"
            )
        files_by_class = [_pictures(folder) for folder in folders]
        files = tuple(path for files in files_by_class for path in files)
        counts = [len(files) for files in files_by_class]
        return Raw(
            images=_Decoded(files),
            labels_N=np.repeat(np.arange(len(folders), dtype=np.int64), counts),
            class_names=tuple(folder.name for folder in folders),
            root=root,
            files=files,
        )


def _pictures(folder: Path) -> list[Path]:
    """The pictures of one class in a fixed order; refuse what is neither picture nor litter."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name not in _LITTER
    )
    for path in found:
        if path.suffix.lower() not in _SUFFIXES:
            raise ConfigError(
                f"{path} is no picture of a known type ({' '.join(_SUFFIXES)}); "
                "convert or remove it"
            )
    if not found:
        raise ConfigError(
            f"class {folder.name!r} has no picture in {folder}; add some or remove it"
        )
    return found


class _Decoded:
    """Pictures decoded one by one as they are asked for."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> "NDArray[np.uint8]":
        return read_picture(self.files[row])
