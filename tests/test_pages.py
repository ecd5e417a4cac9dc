"""The pages: their keys and defaults are those of the components; their links exist."""

import json
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from kd.methods import Method
from kd.methods.trust import Trust
from kd.weightings import Weighting

PROJECT = Path(__file__).parents[1]
DOCS = PROJECT / "docs"
PAGES = [*PROJECT.glob("*.md"), *DOCS.rglob("*.md"), PROJECT / "samples/README.md"]
SHARED = {"kind", "standardize", "trust", "pool"}
"""Keys that methods.md states once, with their defaults, for all kinds that have them."""


def listed(page: str, column: str) -> dict[str, dict[str, str]]:
    """Each kind's keys and defaults, from the table whose first column has this title."""
    text = (DOCS / f"{page}.md").read_text()
    (rows,) = re.findall(rf"^\| {column} \| keys \(default\) \|\n\|.*\n((?:\|.*\n)+)", text, re.M)
    pairs = re.findall(r"^\| `(\w+)` \| (.*) \|$", rows, re.M)
    return {kind: dict(re.findall(r"`(\w+)` \((.*?)\)", keys)) for kind, keys in pairs}


def default(field: Field[Any]) -> Any:
    """A field's default in the form of JSON; "required" if it has none."""
    made = field.default if field.default_factory is MISSING else field.default_factory()
    return "required" if made is MISSING else json.loads(json.dumps(made))


def read(text: str) -> Any:
    """A default, as a page writes it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@pytest.mark.parametrize(
    ("page", "column", "union"),
    [("methods", "kind", Method), ("methods", "trust", Trust), ("weightings", "kind", Weighting)],
)
def test_a_page_lists_every_kinds_keys_with_their_defaults(page, column, union):
    wanted = {}
    for each in get_args(union):
        (kind,) = get_args(get_type_hints(each)["kind"])
        wanted[kind] = {it.name: default(it) for it in fields(each) if it.name not in SHARED}
    found = {
        kind: {name: read(text) for name, text in keys.items()}
        for kind, keys in listed(page, column).items()
    }
    assert found == {kind: keys for kind, keys in wanted.items() if keys}


def test_what_the_page_of_methods_states_once_holds_for_all():
    stated = {"standardize": False, "trust": None, "pool": False}
    for each in get_args(Method):
        given = {it.name: default(it) for it in fields(each) if it.name in stated}
        assert given == {name: stated[name] for name in given}


def anchors(page: Path) -> set[str]:
    """What links can name in a page: its headings, as GitHub writes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_a_pages_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not heading or heading in anchors(target), link
