"""SHA256SUMS: the files of a bundle, in the format of `sha256sum --check`."""

from pathlib import Path

from kd import artifacts
from kd.artifacts import ArtifactError

SUMS = "SHA256SUMS"
BENCHMARK = "benchmark.json"
"""Differs from run to run, so it has no checksum."""


def write(folder: Path) -> None:
    """Write SHA256SUMS, which makes the folder a bundle."""
    lines = [f"{artifacts.sha256(folder / name)}  {name}\n" for name in _names(folder)]
    with artifacts.atomic(folder / SUMS) as temporary:
        temporary.write_text("".join(lines), "utf-8")


def check(folder: Path) -> dict[str, str]:
    """Check a bundle's files; returns their SHA-256 by name.

    Raises:
        ArtifactError: names the first file that is missing, altered or not part of the bundle.
    """
    written = read(folder)
    for name, digest in written.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name} is missing{_remedy(folder)}")
        if artifacts.sha256(folder / name) != digest:
            raise ArtifactError(f"{folder / name} does not match {SUMS}{_remedy(folder)}")
    if foreign := [name for name in _names(folder) if name not in written]:
        raise ArtifactError(f"{folder / foreign[0]} is not part of the bundle: move it away")
    return written


def read(folder: Path) -> dict[str, str]:
    """Read SHA256SUMS: SHA-256 by name.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    path = folder / SUMS
    if not path.exists():
        raise ArtifactError(f"{folder} has no {SUMS}: it is incomplete{_remedy(folder)}")
    try:
        lines = [line.split("  ", 1) for line in path.read_text("utf-8").splitlines()]
        return {name: digest for digest, name in lines}
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged ({error}){_remedy(folder)}") from None


def _names(folder: Path) -> list[str]:
    """The files to be checksummed, by their names below `folder`."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if path.as_posix() not in (SUMS, BENCHMARK) and not passing(path.parts[0])
    )


def passing(name: str) -> bool:
    """Whether a file is temporary: partly written, or Python's cache of classify.py."""
    return name.startswith(".") or name == "__pycache__"


def _remedy(folder: Path) -> str:
    inside = artifacts.ROOT.name in folder.parts
    return f": {artifacts.remedy(folder / SUMS)}" if inside else ": copy the whole folder again"
