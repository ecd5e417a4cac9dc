"""A comparison's plan: units of work with their dependencies and digests."""

import dataclasses
import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kd import artifacts
from kd.build import build, overlay, read_yaml
from kd.component import ConfigError, component, own_sources, require
from kd.data import CustomDataset, ImageFolder
from kd.params import NAME, DataParams, Params, check_own, of_stage, parse

FOLDER = Path(".kd/compare")
"""The folder of all comparisons; each seed has its own workspace in it."""
BESIDE = ("weightings", "stages.py", "cast.py", "params.py")
"""Sources that affect a unit's result, in addition to `artifacts.LEARNING`."""


@component
class About:
    """The section `compare` of a comparison's file; the other keys are as in params.yaml."""

    name: str
    """Names its folder, its report and the tag of its tracking runs."""
    base: str | None = None
    """A file whose keys this file overrides: an experiment (params.yaml) or a comparison."""
    seeds: int = 3
    """Repetitions, at least 2, as a single one shows no spread."""
    reference: str
    """The cell that all others are compared with, seed by seed."""

    def __post_init__(self) -> None:
        wanted = "a name of lowercase letters, digits, - and _"
        require(bool(NAME.fullmatch(self.name)), "name", self.name, wanted)
        require(self.seeds >= 2, "seeds", self.seeds, "at least 2")


@dataclass(frozen=True)
class Unit:
    """One stage of one seed."""

    seed: int
    stage: str
    name: str
    needs: tuple[str, ...]
    """Ids of the units whose results it reads."""
    digest: str
    """Of all that affects its result: settings, code, the user's own files, the units it needs."""

    @property
    def id(self) -> str:
        """Such as seed-3/baselines/dkd."""
        return f"seed-{self.seed}/{self.run_name}"

    @property
    def run_name(self) -> str:
        """Such as baselines/dkd."""
        return f"{self.stage}/{self.name}" if self.name else self.stage


class Comparison:
    """A comparison, as read from its file."""

    def __init__(self, path: Path, seeds: int | None = None) -> None:
        """Read and check the file.

        Args:
            path: The file.
            seeds: Number of seeds, instead of the file's.

        Raises:
            ConfigError: a key, type or value is wrong, no cell has the reference's name, or
                there are too few seeds.
        """
        raw = read_with_base(path)
        try:
            self.about: About = build(About, raw.pop("compare", {}), "compare")
            if seeds is not None:
                self.about = dataclasses.replace(self.about, seeds=seeds)
            cells = raw.pop("cells", {})
            self.raw: dict[str, Any] = {**raw, "baselines": cells}
            reference = self.about.reference
            require(isinstance(cells, dict), "cells", cells, "a mapping of names to settings")
            names = [str(name) for name in cells]
            wanted = f"one of the cells ({', '.join(names)})"
            require(reference in names, "compare.reference", reference, wanted)
            self.params = [parse({**self.raw, "seed": seed}) for seed in range(self.about.seeds)]
            check_own(self.params[0], "data")
            self.own = sources(Path(self.params[0].code))
        except ConfigError as error:
            said = re.sub(r"\bbaselines\.", "cells.", str(error))  # as the file calls them
            raise ConfigError(f"{path}: {said}") from None
        self.folder: Path = FOLDER.resolve() / self.about.name

    @property
    def cells(self) -> tuple[str, ...]:
        """The names of the cells, in the file's order."""
        return tuple(self.params[0].baselines)

    def workspace(self, seed: int) -> Path:
        """The folder with a seed's artifacts."""
        return self.folder / f"seed-{seed}"

    def record(self, unit: Unit) -> Path:
        """The file that records that a unit is done."""
        return self.workspace(unit.seed) / "done" / f"{unit.stage}_{unit.name}.json"

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit has a result, and it is not stale."""
        path = self.record(unit)
        return path.exists() and artifacts.read_json(path).get("digest") == unit.digest

    @cached_property
    def units(self) -> dict[str, Unit]:
        """All units by id, each after those it needs."""
        code = artifacts.code_digest((*artifacts.LEARNING, *BESIDE))
        files = own_files(self.params[0].data)
        given = (code, self.own, files)
        return {unit.id: unit for p in self.params for unit in units_of(p, *given)}


def read_with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file and merge it over its `compare.base`, recursively.

    Args:
        path: The file.
        above: The files that are being merged over this one.

    Raises:
        ConfigError: a file cannot be read, or is its own base.
    """
    raw = read_yaml(path)
    about = raw.get("compare")
    base = about.get("base") if isinstance(about, dict) else None
    if not isinstance(base, str):  # a wrong type is refused when the section is built
        return raw
    below = path.parent / base
    if below.resolve() in (known := (*above, path.resolve())):
        raise ConfigError(f"{path}: compare.base is {base!r}, which has this file as its base")
    return dict(overlay(read_with_base(below, known), raw))


def sources(code: Path) -> list[str]:
    """SHA-256 of each file of the user's own code."""
    files = sorted(code.rglob("*.py")) if code.is_dir() else [code]
    return [artifacts.sha256(each) for each in files if each.exists()]


def units_of(
    params: Params, code: str, theirs: Sequence[str], files: Sequence[Any]
) -> Iterator[Unit]:
    """The units of one seed, each after those it needs.

    Args:
        params: The seed's parameters.
        code: Digest of all our own code that is involved.
        theirs: SHA-256 of the user's code; counts only for units that use a part of it.
        files: Name, size and time of the user's own data files; counts for the data unit.
    """
    made: dict[str, Unit] = {}

    def unit(stage: str, name: str, needs: tuple[str, ...]) -> Unit:
        ids = tuple(f"seed-{params.seed}/{each}" for each in needs)
        plain = of_stage(params, stage, name)
        own = [*parts, *theirs] if (parts := own_sources(plain)) else []
        own += files if stage == "data" else []
        needed = [made[each].digest for each in ids]
        digest = artifacts.digest([code, stage, name, plain, own, needed])
        new = Unit(params.seed, stage, name, ids, digest)
        made[new.id] = new
        return new

    yield unit("data", "", ())
    yield unit("teacher", "", ("data",))
    for name in sorted(params.assistants, key=lambda each: len(params.chain(each))):
        yield unit("assistants", name, ("data", *params.chain(name)))
    assistants = tuple(f"assistants/{name}" for name in params.assistants)
    yield unit("weights", "", ("data", *assistants))
    for name in params.baselines:
        yield unit("baselines", name, ("data", "teacher", *assistants, "weights"))


def own_files(data: DataParams) -> list[tuple[str, int, int]]:
    """Name, size and mtime of each of the user's own data files, to notice edits.

    Empty for public data sets, which never change.
    """
    if not isinstance(data.dataset, ImageFolder | CustomDataset):
        return []
    source = Path(data.source).expanduser()
    below = glob.iglob("**", root_dir=source, recursive=True)  # unlike rglob, follows symlinks
    found = [each for each in (source, *map(source.joinpath, below)) if each.is_file()]
    stats = [(each.as_posix(), each.stat()) for each in found if each.suffix != ".pyc"]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
