"""params.yaml -> typed Params.

Errors that the file alone reveals are found here, before data is read.  Checks that need the
user's own code or torchvision run before every stage (`check_own`); those that need the images'
size and classes run in the data stage before it writes anything (`read_data` in kd/stages.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

from kd.build import build, join, overlay, read_yaml
from kd.component import ConfigError, component, own_file, require
from kd.data import CustomDataset, Dataset, ImageFolder, Splits
from kd.exporters import Exporter
from kd.methods import CustomMethod, Method
from kd.methods.trust import Unbiased
from kd.models import CustomModel, Model, TorchvisionModel
from kd.recipe import Recipe
from kd.weightings import Fixed, Weighting
from kd.workspace import check_root

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
"""Names become folders, DVC stages and MLflow runs; these are valid in all three."""
RESERVED = ("teacher", "generation", "value", "temperature")
"""Names that no assistant may have: the teacher's, and other columns of the weight tables."""


@component
class DataParams:
    """Which images, in which form, split how."""

    source: str = "kd/data"
    """The path that DVC watches: an image folder; or for public data, which never change, the
    code that reads them."""
    dataset: Dataset
    image_size: int
    """Height and width in pixels to which every image is resized."""
    channels: Literal[1, 3]
    """1: grey, 3: colour."""
    splits: Splits = Splits()

    def __post_init__(self) -> None:
        require(self.image_size >= 4, "image_size", self.image_size, "at least 4 pixels")
        if isinstance(self.dataset, ImageFolder):
            root = self.dataset.root
            require(self.source == root, "source", self.source, f"{root!r}, as in dataset.root")
        if isinstance(self.dataset, CustomDataset):
            wanted = "a path for DVC to watch: your data set's files, or its code"
            require(self.source != "kd/data", "source", self.source, wanted)


@component
class TeacherParams:
    """The large network, trained on labels."""

    model: Model
    recipe: Recipe


@component
class LearnerParams:
    """A student or assistant: it learns from others."""

    model: Model
    method: Method
    recipe: Recipe
    peers: dict[str, Model] = field(default_factory=dict)
    """Networks trained along with it, by name; for methods that need peers."""
    generations: int = 1
    """How often it is trained, at least 1; later generations are taught only by the previous."""

    def __post_init__(self) -> None:
        check_peers(self.method, self.peers)
        require(self.generations >= 1, "generations", self.generations, "at least 1")
        check_trust(self.method, self.recipe, self.generations, "")


@component
class StudentParams(LearnerParams):
    """The student, taught by the weighted ensemble of assistants if its method needs teachers."""

    teacher_share: float = 0.0
    """Weight of the teacher itself, in [0, 1]; the assistants share the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.teacher_share <= 1, "teacher_share", self.teacher_share, "in [0, 1]")


@component
class AssistantParams(LearnerParams):
    """An assistant, and its place in the chain from the teacher to the student."""

    taught_by: str
    """teacher, or another assistant as assistants/NAME."""
    dense: bool = False
    """Taught by everyone before it in the chain, the teacher included, with equal weights (DGKD);
    else by `taught_by` alone (TAKD)."""


@component
class BaselineParams:
    """The student again: same model, budget and seed, but other teachers or another method."""

    teachers: Literal["none", "teacher", "assistants", "everyone"] | tuple[str, ...]
    """none; the teacher alone; all assistants; both; or a list of names, the teacher's being
    "teacher"."""
    weighting: Weighting | None = None
    """How several teachers are weighted; null, for a list only: equally."""
    method: Method | None = None
    """null: the student's."""
    peers: dict[str, Model] = field(default_factory=dict)
    """As in `student`."""
    generations: int = 1
    """As in `student`."""

    def __post_init__(self) -> None:
        if self.teachers in ("assistants", "everyone"):
            wanted = f"given with `teachers: {self.teachers}`"
            require(self.weighting is not None, "weighting", self.weighting, wanted)
        elif isinstance(self.teachers, str):
            wanted = f"left out with `teachers: {self.teachers}`"
            require(self.weighting is None, "weighting", self.weighting, wanted)
        else:
            require(len(self.teachers) > 0, "teachers", self.teachers, "at least one name")
        if self.method is not None:
            check_peers(self.method, self.peers)
            listens = self.method.needs == "teachers" or self.method.kind == "custom"
            wanted = f"none with method.kind {self.method.kind}, which needs no teachers"
            require(listens or self.teachers == "none", "teachers", self.teachers, wanted)
        else:
            require(not self.peers, "peers", sorted(self.peers), "given only with a method")
        require(self.generations >= 1, "generations", self.generations, "at least 1")


def teachers_named(asked: str | tuple[str, ...], assistants: tuple[str, ...]) -> tuple[str, ...]:
    """The teachers that a baseline asks for, by name."""
    if not isinstance(asked, str):
        return asked
    groups = {"none": (), "teacher": ("teacher",), "assistants": assistants}
    return groups.get(asked, (*assistants, "teacher"))


def check_trust(method: Method, recipe: Recipe, generations: int, path: str) -> None:
    """Refuse a `trust` that the recipe or the generations of the section at `path` rule out."""
    trust = getattr(method, "trust", None)
    if getattr(trust, "reads_labels", False):
        wanted = f"0 with {join(path, 'method.trust')}: a mixed image has no label of its own"
        require(recipe.mixup == 0, "recipe.mixup", recipe.mixup, wanted)
    if isinstance(trust, Unbiased):
        wanted = "1 with method.trust unbiased: later generations have only one teacher"
        require(generations == 1, join(path, "generations"), generations, wanted)


def check_peers(method: Method, peers: Mapping[str, Model]) -> None:
    """Refuse too many or too few peers for a method."""
    wanted = f"{method.num_peers.start} to {method.num_peers.stop - 1} networks"
    require(len(peers) in method.num_peers, "peers", sorted(peers), f"{wanted} ({method.kind})")


@component
class ReportParams:
    """What the report measures besides accuracy."""

    latency_seconds: float = 3.0
    """Time to measure the latency of all networks and files together, in turns; above 0."""

    def __post_init__(self) -> None:
        require(self.latency_seconds > 0, "latency_seconds", self.latency_seconds, "above 0")


@component
class Params:
    """One experiment: all of params.yaml, whose sections are the stages."""

    seed: int = 0
    """Decides every random choice; another seed repeats the experiment independently."""
    tracking: bool = True
    """Whether to log to MLflow."""
    code: str = "kd/data"
    """The file or folder of the user's own code, which DVC watches for every stage; if there is
    none, a folder of ours on which every stage depends anyway."""
    data: DataParams
    teacher: TeacherParams
    assistants: dict[str, AssistantParams]
    """By name, at least one."""
    weights: Weighting
    student: StudentParams
    baselines: dict[str, BaselineParams]
    exports: dict[str, Exporter]
    report: ReportParams = ReportParams()

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "a whole number, at least 0")
        for section in ("assistants", "baselines", "exports"):
            require(bool(getattr(self, section)), section, {}, "at least one")
            for name in getattr(self, section):
                wanted = "a name of lowercase letters, digits, - and _"
                require(bool(NAME.fullmatch(name)), f"{section}.{name}", name, wanted)
        for name in self.assistants:
            wanted = f"another name: {', '.join(RESERVED)} are reserved"
            require(name not in RESERVED, f"assistants.{name}", name, wanted)
            self.chain(name)
        for name, baseline in self.baselines.items():
            if isinstance(baseline.teachers, tuple):
                known, named = {"teacher", *self.assistants}, set(baseline.teachers)
                fits = named <= known and len(named) == len(baseline.teachers)
                wanted = f"names among {sorted(known)}, each of them once"
                require(fits, f"baselines.{name}.teachers", baseline.teachers, wanted)
        self.check_shifts()
        self.check_fixed()
        self.check_teachers()

    def check_shifts(self) -> None:
        """Refuse views that show nothing of an image."""
        sections: dict[str, TeacherParams | LearnerParams] = {
            "teacher": self.teacher,
            "student": self.student,
            **{f"assistants.{name}": each for name, each in self.assistants.items()},
        }
        for path, section in sections.items():
            shift = section.recipe.augment.shift
            wanted = f"below data.image_size, which is {self.data.image_size}"
            fits = shift < self.data.image_size
            require(fits, f"{path}.recipe.augment.shift", shift, wanted)

    def check_fixed(self) -> None:
        """Refuse fixed weights that are not given for exactly the members."""
        everyone = tuple(self.assistants)
        places: list[tuple[str, Weighting | None, tuple[str, ...]]] = [
            ("weights", self.weights, everyone)
        ]
        for name, each in self.baselines.items():
            named = teachers_named(each.teachers, everyone)
            places.append((f"baselines.{name}.weighting", each.weighting, named))
        for path, weighting, members in places:
            if isinstance(weighting, Fixed):
                fits = set(weighting.weights) == set(members)
                wanted = f"given for {', '.join(members)} and no others"
                require(fits, f"{path}.weights", weighting.weights, wanted)

    def check_teachers(self) -> None:
        """Refuse settings that do not suit a network's teachers."""
        everyone = tuple(self.assistants)
        for name, assistant in self.assistants.items():
            above = [each.removeprefix("assistants/") for each in self.chain(name)]
            teachers = above if assistant.dense else above[:1]
            self.check_taught(f"assistants.{name}", assistant, teachers)
        asked = "everyone" if self.student.teacher_share else "assistants"
        self.check_taught("student", self.student, teachers_named(asked, everyone))
        for name, baseline in self.baselines.items():
            named = teachers_named(baseline.teachers, everyone)
            self.check_taught(f"baselines.{name}", baseline, named)

    def check_taught(
        self, path: str, section: LearnerParams | BaselineParams, teachers: Sequence[str]
    ) -> None:
        """Refuse a section, at `path`, whose method or recipe does not suit its teachers."""
        method = section.method or self.student.method
        recipe = section.recipe if isinstance(section, LearnerParams) else self.student.recipe
        where = path if isinstance(section, LearnerParams) else "student"
        taught = bool(teachers) or section.generations > 1 or method.needs != "teachers"
        if recipe.devices > 1 and taught and method.kind != "custom":
            wanted = f"1 with {path}.method, which compares the images of a batch"
            require(method.by_image, f"{where}.recipe.devices", recipe.devices, wanted)
        if not teachers or method.needs != "teachers":
            return
        if isinstance(section, BaselineParams):
            check_trust(method, recipe, section.generations, path)
        trust = getattr(method, "trust", None)
        if isinstance(trust, Unbiased):
            key = f"{path}.method.trust.biased"
            wanted = f"one of {sorted(teachers)}, the teachers"
            require(trust.biased in teachers, key, trust.biased, wanted)
            wanted = "one of several teachers: the biased one does not teach"
            require(len(teachers) > 1, key, trust.biased, wanted)
        models = {"teacher": self.teacher.model} | {n: a.model for n, a in self.assistants.items()}
        alike = all(models[each] == models[teachers[0]] for each in teachers)
        wanted = f"online or cached: {', '.join(teachers)} differ in architecture"
        fits = alike or recipe.targets != "stacked"
        require(fits, f"{where}.recipe.targets", recipe.targets, wanted)

    def learners(self) -> dict[str, tuple[Model, Method | None, Mapping[str, Model]]]:
        """Each learner's model, method (None: labels) and peers, by its path in the file."""
        found: dict[str, tuple[Model, Method | None, Mapping[str, Model]]] = {
            "teacher": (self.teacher.model, None, {}),
            "student": (self.student.model, self.student.method, self.student.peers),
        }
        for name, each in self.assistants.items():
            found[f"assistants.{name}"] = (each.model, each.method, each.peers)
        for name, baseline in self.baselines.items():
            if baseline.method is not None:  # else it learns as the student does
                given = (self.student.model, baseline.method, baseline.peers)
                found[f"baselines.{name}"] = given
        return found

    def chain(self, name: str) -> tuple[str, ...]:
        """Run names of everyone before an assistant, its own teacher first.

        Raises:
            ConfigError: `taught_by` names nobody, or the chain is a cycle.
        """
        found: list[str] = []
        above = self.assistants[name].taught_by
        while above != "teacher":
            key, _, other = above.rpartition("/")
            known = key == "assistants" and other in self.assistants
            wanted = "teacher, or assistants/NAME of another whose chain ends there"
            fits = known and other != name and above not in found
            require(fits, f"assistants.{name}.taught_by", above, wanted)
            found.append(above)
            above = self.assistants[other].taught_by
        return (*found, "teacher")


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check an experiment.

    Raises:
        ConfigError: no such file, not YAML, a key given twice, or a wrong key, type or value.
    """
    raw = read_yaml(path)
    try:
        return parse(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(raw: Mapping[str, Any]) -> Params:
    """Check plain data and turn it into Params; `recipe` holds defaults for each role's recipe."""
    raw = dict(raw)
    defaults = raw.pop("recipe", {})
    build(Recipe, defaults, "recipe")  # so that an error in it is reported once, where it is
    for section in ("teacher", "student"):
        if isinstance(raw.get(section), dict):
            raw[section] = with_recipe(raw[section], defaults)
    if isinstance(raw.get("assistants"), dict):
        raw["assistants"] = {
            name: with_recipe(entry, defaults) if isinstance(entry, dict) else entry
            for name, entry in raw["assistants"].items()
        }
    params: Params = build(Params, raw, "")
    return params


def check_own(params: Params, stage: str = "") -> None:
    """Look up what params.yaml only names: the user's own models and methods, torchvision's
    models, and for the stage `data` the data set.

    All of them, whatever the stage needs, so that a typo is found before anything is trained.
    Only the data set is left out: it may be missing where networks are trained.

    Raises:
        ConfigError: names the key of what cannot be found, or be called so, or is not watched.
    """
    found: dict[str, Dataset | Model | Method | None] = {}
    for path, (model, method, peers) in params.learners().items():
        found |= {f"{path}.model": model, f"{path}.method": method}
        found |= {f"{path}.peers.{name}": peer for name, peer in peers.items()}
    if stage == "data":
        found["data.dataset"] = params.data.dataset
    for key, part in found.items():
        if isinstance(part, CustomDataset | CustomModel | CustomMethod | TorchvisionModel):
            try:
                part.check()
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from error
        if isinstance(part, CustomDataset | CustomModel | CustomMethod):
            source = params.data.source if key == "data.dataset" else params.code
            check_watched(key, part.path, params.code, source)


def check_watched(key: str, path: str, code: str, source: str) -> None:
    """Refuse code of the user's own, named at `key`, whose file is in neither path."""
    file = own_file(path)
    if file and not any(file.is_relative_to(Path(each).resolve()) for each in (code, source)):
        check_root()
        where = f"{file.relative_to(Path.cwd().resolve())}, or a folder that holds it"
        require(False, "code", code, f"{where}: {key} is there, and DVC must watch it")


BARE = {"weights": "weighting", "exports": "export"}
"""Stages whose section is a single component, and its key in the result of `of_stage`."""


def of_stage(params: Params, stage: str, name: str) -> dict[str, Any]:
    """The settings of one stage as plain data, under the same keys whatever its name is."""
    section = getattr(params, stage)
    plain = asdict(section[name] if name else section)
    if stage in BARE:
        plain = {BARE[stage]: plain}
    student = asdict(params.student) if stage == "baselines" else {}
    own = {key: value for key, value in plain.items() if value or key not in student}
    return {"seed": params.seed, **student, **own}


def with_recipe(section: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The section with its own recipe laid over the default one."""
    return {**section, "recipe": overlay(defaults, section.get("recipe", {}))}
