"""@component: one class is both configuration and code.

A component is a frozen, keyword-only dataclass.  Its fields are what a user may write in
params.yaml, its ``__post_init__`` refuses values out of range, and its methods do the work.
``kind`` names it: ``Method = KD | Labels`` is at once the type and the registry, and
params.yaml picks a member of the union with ``kind: kd``.

    @component
    class Dropout:
        \"\"\"Zero a share of the activations.\"\"\"

        kind: Literal["dropout"] = "dropout"
        share: float = 0.5
        \"\"\"Probability that a unit is dropped, in [0, 1).\"\"\"

        def __post_init__(self) -> None:
            require(0 <= self.share < 1, "share", self.share, "in [0, 1)")
"""

import dataclasses
import functools
import importlib
import inspect
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, dataclass_transform, get_args, get_origin

from kd.disk import sha256

C = TypeVar("C")
PIPELINE = {"PIL", "matplotlib", "optuna", "psutil", "scipy", "sklearn", "torchvision"}
"""What stages and comparisons import of the extra `pipeline`, each where it is first needed."""


class ConfigError(ValueError):
    """The user's input is unusable.  The message names the key or file, and the remedy."""


class Refused(RuntimeError):
    """The work was done, but its result is rejected.  The message says why."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def component(cls: type[C]) -> type[C]:
    """Make `cls` a frozen, keyword-only dataclass that refuses unknown keys and wrong types.

    Fields that are a Literal are checked wherever the component is made.  Other keys and types
    are checked when params.yaml is parsed (kd/build.py, which looks for `__pydantic_config__`);
    this module needs only the standard library.
    """
    own_check = getattr(cls, "__post_init__", lambda self: None)

    def checked(self: C) -> None:
        check_choices(self)
        own_check(self)

    cls.__post_init__ = checked  # type: ignore[attr-defined]
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    made.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return made


def check_choices(made: Any) -> None:
    """Refuse a value that its field's Literal does not name, which would pass for another.

    Raises:
        ConfigError: names the field and its choices.
    """
    for field in dataclasses.fields(made):
        if get_origin(field.type) is Literal:
            choices, value = get_args(field.type), getattr(made, field.name)
            wanted = ", ".join(map(repr, choices))
            require(value in choices, field.name, value, f"one of {wanted}")


def require(holds: bool, field: str, value: object, wanted: str) -> None:
    """Refuse a field's value: raise ConfigError("`field` is `value`; it must be `wanted`")."""
    if not holds:
        raise ConfigError(f"{field} is {value!r}; it must be {wanted}")


def described(value: object) -> str:
    """A tensor's or array's shape and type, for a message; of anything else, its class."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    name = type(value).__name__
    return name if shape is None else f"{name} {tuple(shape)} {dtype}"


def reason(error: BaseException) -> str:
    """The first line of an error's message; its repr if it has no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means out of memory.

    Only PyTorch's GPU allocator has a class for it (torch.OutOfMemoryError); errors of the
    driver, cuBLAS, cuDNN and the host's allocator are recognised by their text.
    """
    lacking = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")
    return any(words in str(error) for words in lacking)


def source_of(thing: object) -> str:
    """SHA-256 of the file that defines a class or function; "" if there is no such Python file.

    What that file imports is not included.
    """
    try:
        return sha256(Path(inspect.getfile(thing)))  # type: ignore[arg-type]
    except (TypeError, OSError):  # built in, or defined at a prompt
        return ""


def own_sources(settings: object) -> list[str]:
    """SHA-256 of each file of the user's code that plain settings name, at any depth."""
    if not isinstance(settings, Mapping):
        return []
    if settings.get("kind") == "custom":
        return [source_of(load_object(settings["path"]))]
    return [found for each in settings.values() for found in own_sources(each)]


def load_object(path: str) -> Any:
    """Import what `path`, of the form "package.module:Name", names in the user's own code.

    Raises:
        ConfigError: the path is malformed, or the module cannot be imported or lacks the name.
    """
    module_name, _, name = path.partition(":")
    require(bool(module_name and name), "path", path, 'of the form "package.module:Name"')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ConfigError(f"path {path!r}: {import_failure(module_name, error)}") from error
    if not hasattr(module, name):
        raise ConfigError(f"path {path!r}: module {module_name} has no {name!r}")
    return getattr(module, name)


def import_failure(module_name: str, error: Exception) -> str:
    """Describe a failed import, with the line in the user's code."""
    if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
        remedy = "run from the folder that holds it, or install it"
        return f"cannot import {module_name} ({error}); {remedy}"
    if isinstance(error, SyntaxError):
        place = f"{error.filename}, line {error.lineno}"
        return f"cannot import {module_name} ({type(error).__name__} in {place}: {error.msg})"
    return f"cannot import {module_name} ({raised(error)})"


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install after a failed import; None if the package is not in PIPELINE."""
    package = (error.name or "").partition(".")[0]
    return to_install(package, "pipeline") if package in PIPELINE else None


def to_install(package: str, extra: str) -> str:
    """What to install where a package of that extra is missing."""
    return (
        f"this needs the package {package!r}, which is not installed; "
        f"run: pip install 'kd[{extra}]'"
    )


def raised(error: Exception) -> str:
    """An error's class, its line in the user's own code, and its message."""
    package = f"{Path(__file__).parent}/"
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), package, "<")
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [each for each in frames if not each.filename.startswith(libraries)]
    place = f" in {theirs[-1].filename}, line {theirs[-1].lineno}" if theirs else ""
    return f"{type(error).__name__}{place}: {error}"


def own_file(path: str) -> Path | None:
    """The file of a path's module if it is in this folder; None if it is installed."""
    module = importlib.import_module(path.partition(":")[0])
    file = Path(getattr(module, "__file__", None) or "/").resolve()
    installed = file.is_relative_to(Path(sysconfig.get_path("purelib")).resolve())
    return file if file.is_relative_to(Path.cwd().resolve()) and not installed else None


def bound_object(
    path: str, args: Mapping[str, Any], offered: Mapping[str, Any]
) -> functools.partial[Any]:
    """The callable that `path` names, bound to `args` and to those of `offered` that it takes.

    Raises:
        ConfigError: it cannot be found, or does not take these arguments.
    """
    factory = load_object(path)
    if not callable(factory):
        raise ConfigError(f"path {path!r} names a {type(factory).__name__}, not a function")
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some builtins have none
        return functools.partial(factory, **args)
    parameters = signature.parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    taken = {name: value for name, value in offered.items() if takes_any or name in parameters}
    given = {**taken, **args}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ConfigError(f"path {path!r} cannot be called with {args} ({error})") from error
    return functools.partial(factory, **given)


def call_object(path: str, args: Mapping[str, Any], offered: Mapping[str, Any]) -> Any:
    """Call what `path` names, and return the result; see `bound_object`.

    Raises:
        ConfigError: it cannot be found, or the call fails.
    """
    call = bound_object(path, args, offered)
    try:
        return call()
    except ConfigError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"path {path!r} cannot be called with {call.keywords} ({raised(error)})"
        ) from error
