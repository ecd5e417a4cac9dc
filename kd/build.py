"""YAML and plain data -> components.  The only importer of yaml and pydantic.

Errors are named by their path in the data ("student.method.temperature"), with the nearest valid
key if a key is unknown.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pydantic
import yaml

from kd.component import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, a key given twice, or not a mapping.
    """
    try:
        raw = yaml.load(path.read_text("utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: run from the project's root") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or month 13 of a date
        raise ConfigError(f"{path} is not valid YAML: {said_in_a_line(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} does not map stages to settings")
    return raw


def said_in_a_line(error: Exception) -> str:
    """What a YAML error says in several lines, without the quoted text."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    begun = error.context_mark and error.context_mark.line + 1
    context = f" ({error.context}, line {begun})" if begun else ""
    return f"line {error.problem_mark.line + 1}: {error.problem}{context}"


def overlay(below: Any, above: Any) -> Any:
    """`above` laid over `below`, key by key; another `kind` replaces the whole component."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if above.get("kind", below.get("kind")) != below.get("kind"):
        return above
    return {**below, **{key: overlay(below.get(key), value) for key, value in above.items()}}


def build(wanted: Any, raw: Any, path: str) -> Any:
    """Turn plain data into an object of type `wanted`, recursing into components and mappings.

    Raises:
        ConfigError: names the path of what is wrong.
    """
    if members := components_in(wanted):
        optional = NoneType in get_args(wanted)
        return None if raw is None and optional else build_component(members, raw, path)
    if get_origin(wanted) is dict and components_in(entry := get_args(wanted)[1]):
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} is {raw!r}; it must map names to settings")
        return {str(name): build(entry, value, join(path, name)) for name, value in raw.items()}
    try:
        adapter = pydantic.TypeAdapter(wanted, config={"allow_inf_nan": False})
        return adapter.validate_python(tuples(raw), strict=True)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{path} is {raw!r}: {reason[0].lower()}{reason[1:]}") from None


def components_in(wanted: Any) -> list[Any]:
    """The component classes that a type is, or is a union of."""
    options = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    return [option for option in options if hasattr(option, "__pydantic_config__")]


def build_component(members: list[Any], raw: Any, path: str) -> Any:
    """The member of a union that `raw` names by `kind`, with `raw`'s fields."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{path or 'it'} is {raw!r}; it must be a mapping of keys to values")
    cls = choose(members, raw, path)
    hints = get_type_hints(cls)
    known = {each.name: each for each in fields(cls)}
    for name in raw:
        if name not in known:
            raise ConfigError(f"{join(path, name)} is not a known key{nearest(name, known)}")
    missing = [
        name
        for name, each in known.items()
        if name not in raw and each.default is MISSING and each.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"{join(path, missing[0])} is missing")
    values = {name: build(hints[name], value, join(path, name)) for name, value in raw.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(join(path, str(error))) from None


def choose(members: list[Any], raw: Mapping[str, Any], path: str) -> Any:
    """The component class that `raw` asks for."""
    if len(members) == 1 and ("kind" not in raw or not hasattr(members[0], "kind")):
        return members[0]
    kinds = {get_args(get_type_hints(member)["kind"])[0]: member for member in members}
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        said = f"is {kind!r}" if "kind" in raw else "is missing"
        raise ConfigError(f"{join(path, 'kind')} {said}{nearest(kind, kinds)}")
    return kinds[kind]


def join(path: str, name: str) -> str:
    """The path of a key inside the section at `path`."""
    return f"{path}.{name}" if path else str(name)


def nearest(name: object, known: Iterable[str]) -> str:
    """The nearest known name, or else all of them, as the end of a sentence."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def tuples(raw: Any) -> Any:
    """Plain data with YAML's lists turned into tuples, as frozen components hold them."""
    if isinstance(raw, list):
        return tuple(tuples(entry) for entry in raw)
    return raw


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, of which it would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                twice = f"the key {name!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key.start_mark)
            seen.add(name)
        return node


_Loader.add_implicit_resolver(  # 1e-3 is a string in YAML 1.1, a number in YAML 1.2 and to users
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
