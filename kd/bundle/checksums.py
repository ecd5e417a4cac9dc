"""SHA256SUMS: which files a bundle consists of, as `sha256sum --check` reads it."""

from pathlib import Path

from kd import artifacts
from kd.artifacts import ArtifactError

SUMS = "SHA256SUMS"
BENCHMARK = "benchmark.json"
"""Differs from run to run, so no checksum says what it must be."""


def write(folder: Path) -> None:
    """Write SHA256SUMS, by which the folder becomes a bundle."""
    lines = [f"{artifacts.sha256(folder / name)}  {name}\n" for name in _names(folder)]
    with artifacts.atomic(folder / SUMS) as temporary:
        temporary.write_text("".join(lines), "utf-8")


def check(folder: Path) -> dict[str, str]:
    """SHA-256 by name of a bundle's files, all of which are there and as they were written.

    Raises:
        ArtifactError: names the first file that is missing, altered or foreign.
    """
    written = read(folder)
    for name, digest in written.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name} is missing{_remedy(folder)}")
        if artifacts.sha256(folder / name) != digest:
            raise ArtifactError(f"{folder / name} is not the file of {SUMS}{_remedy(folder)}")
    if foreign := [name for name in _names(folder) if name not in written]:
        raise ArtifactError(f"{folder / foreign[0]} is no part of the bundle: move it away")
    return written


def read(folder: Path) -> dict[str, str]:
    """SHA-256 by name, as SHA256SUMS has them.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    path = folder / SUMS
    if not path.exists():
        raise ArtifactError(f"{folder} has no {SUMS}: it is no whole bundle{_remedy(folder)}")
    try:
        lines = [line.split("  ", 1) for line in path.read_text("utf-8").splitlines()]
        return {name: digest for digest, name in lines}
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged ({error}){_remedy(folder)}") from None


def _names(folder: Path) -> list[str]:
    """The files that count, by their names below `folder`."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if path.as_posix() not in (SUMS, BENCHMARK) and not passing(path.parts[0])
    )


def passing(name: str) -> bool:
    """Whether a file comes and goes: half-written, or what Python leaves beside classify.py."""
    return name.startswith(".") or name == "__pycache__"


def _remedy(folder: Path) -> str:
    inside = artifacts.ROOT.name in folder.parts
    return f": {artifacts.remedy(folder / SUMS)}" if inside else ": copy the whole folder again"
