"""The rules of docs/architecture.md that a machine can hold us to."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
import yaml

from kd import FAMILIES, STAGES, artifacts, stages

PROJECT = Path(__file__).parents[1]
KD = sorted((PROJECT / "kd").rglob("*.py"))
FLOWS = sorted((PROJECT / "flows").rglob("*.py"))


def matching(files, pattern):
    return {
        str(path.relative_to(PROJECT))
        for path in files
        if re.search(pattern, path.read_text(), re.M)
    }


def importers(files, module):
    return matching(files, rf"^\s*(import|from) {module}\b")


def test_only_the_training_loop_calls_backward():
    assert matching(KD, r"\.backward\(") == {"kd/train/loop.py"}


def test_the_square_of_the_temperature_stands_in_one_line():
    lines = [line for path in KD for line in path.read_text().splitlines()]
    assert sum("temperature**2" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("module", "door"),
    [
        ("mlflow", {f"kd/tracking/{name}.py" for name in ("store", "models", "trash")}),
        (
            "optuna",
            {str(path.relative_to(PROJECT)) for path in KD if path.parent.name == "de_sampler"},
        ),
        ("yaml", {"kd/build.py"}),
        ("pydantic", {"kd/build.py"}),
        ("prefect", set()),
    ],
)
def test_each_foreign_tool_has_one_door(module, door):
    assert importers(KD, module) <= door


def test_flows_hold_no_tensors():
    assert importers(FLOWS, "torch") == set()


def test_nothing_is_unpickled():
    assert matching(KD + FLOWS, r"pickle\.load|torch\.load\(|joblib|allow_pickle=True") == set()


BLOCKED = (
    "mlflow optuna prefect dvc yaml pydantic numpy sklearn torchvision safetensors matplotlib"
)


def test_the_core_imports_with_torch_alone():
    """On a bare GPU machine there is torch, and nothing else that we may count on."""
    script = f"""
import sys
# torch imports numpy by itself where it is there, so it is let in before the gate closes.
import torch, torch.optim.swa_utils, torch.utils.flop_counter
class Gate:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED.split()!r} and name not in sys.modules:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Gate())
for name in [n for n in sys.modules if n.split(".")[0] in {BLOCKED.split()!r}]:
    del sys.modules[name]
import kd.train, kd.ensemble, kd.methods, kd.models, kd.data, kd.recipe, kd.evaluate
"""
    subprocess.run([sys.executable, "-c", script], cwd=PROJECT, check=True, timeout=120)


@pytest.fixture(scope="module")
def dag():
    return yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]


@pytest.fixture(scope="module")
def experiment():
    return yaml.safe_load((PROJECT / "params.yaml").read_text())


def test_stages_have_one_name_everywhere(dag, experiment):
    assert tuple(dag) == STAGES == tuple(stages.STAGES)
    assert set(STAGES) <= set(experiment)
    assert {name for name, stage in dag.items() if "foreach" in stage} == set(FAMILIES)


def body(stage):
    return stage.get("do", stage)


def paths(entries):
    """Paths of deps or outs, which may carry options."""
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def test_a_stage_writes_its_own_folder_and_its_own_run_record(dag):
    for name, stage in dag.items():
        key = "/${key}" if "foreach" in stage else ""
        outs = paths(
            [o for kind in ("outs", "metrics", "plots") for o in body(stage).get(kind, [])]
        )
        own = (f"artifacts/{name}{key}", f"artifacts/runs/{name}{key}", f"artifacts/runs/{name}.")
        assert all(path.startswith(own) for path in outs), name
        assert f"artifacts/runs/{name}{key}.json" in outs


def test_the_command_names_the_stage_and_holds_no_numbers(dag):
    for name, stage in dag.items():
        key = " ${key}" if "foreach" in stage else ""
        assert body(stage)["cmd"] == f"python -m kd {name}{key}"


def test_only_the_report_opens_the_test_split(dag):
    readers = {n for n, s in dag.items() if "artifacts/data/test" in paths(body(s)["deps"])}
    assert readers == {"report"}
    assert not any("artifacts/data" in paths(body(s)["deps"]) for s in dag.values())


def test_no_stage_depends_on_a_run_record(dag):
    """Run records differ each time; a stage that read one would never be up to date."""
    deps = [path for stage in dag.values() for path in paths(body(stage)["deps"])]
    assert not any(path.startswith("artifacts/runs") or path == "artifacts" for path in deps)


UNWATCHED = {
    "kd": "the stages' names",
    "artifacts": "how files are kept, not what is in them",
    "checkpoint": "how files are kept, not what is in them",
    "component": "checks of settings",
    "disk": "how files are kept, not what is in them",
    "git": "what a run's record says of the commit",
    "launch": "how several processes are started and ended",
    "machine": "what is written down of a run, and kept of a measurement",
    "manifest": "how files are kept, not what is in them",
    "progress": "what is shown meanwhile",
    "promotion": "what the registry is told",
    "signals": "how a process ends that is told to",
    "stopping": "how a process ends that is told to",
    "tables": "how files are kept, not what is in them",
    "tracking": "what MLflow is told",
    "warm": "in which process a stage runs",
    "workspace": "where files are kept, not what is in them",
}
"""Modules that stages run and DVC does not watch, and what they do instead of deciding results.

kd/stages.py is left out, too: it calls what decides, and any line would train everything again.
"""
LEAVES = ("artifacts", "params", "progress", "promotion", "tracking")
"""What they import is for other stages (every kind of everything), for types or for MLflow."""
TRIALS = {"try_learners", "try_export"}
"""What `data` calls only to refuse early what would fail later."""


@pytest.fixture(scope="module")
def imports():
    """Who imports whom among the parts of kd."""
    graph = grimp.build_graph("kd", cache_dir=None)
    for part in graph.find_children("kd"):
        graph.squash_module(part)
    for part in (f"kd.{name}" for name in LEAVES):
        for imported in graph.find_modules_directly_imported_by(part):
            graph.remove_import(importer=part, imported=imported)
    return graph


def called_by(stage):
    """The parts of kd whose names the stage's function uses, and those that it calls."""
    tree = ast.parse((PROJECT / "kd/stages.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    part_of = {}
    for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
        for alias in node.names:
            parts = [*node.module.split("."), alias.name]
            part_of[alias.asname or alias.name] = ".".join(parts[:2])
    used, upcoming = set(), [stage]
    while upcoming:
        nodes = [n for each in functions[upcoming.pop()].body for n in ast.walk(each)]
        called = {n.func.id for n in nodes if isinstance(n, ast.Call) and hasattr(n.func, "id")}
        upcoming += (called - used - TRIALS) & set(functions)
        used |= called | {n.id for n in nodes if isinstance(n, ast.Name)}
    parts = {part_of[name] for name in (used - TRIALS) & set(part_of)}
    return {part for part in parts if part.startswith("kd.")}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_watches_the_code_that_decides_its_result(dag, imports, name):
    own = called_by(name)
    parts = own.union(*(imports.find_upstream_modules(part) for part in own))
    parts = {part.partition(".")[2] or part for part in parts} - set(UNWATCHED)
    wanted = {f"kd/{p}" if (PROJECT / "kd" / p).is_dir() else f"kd/{p}.py" for p in parts}
    watched = set(paths(body(dag[name])["deps"]))
    assert wanted <= watched
    assert all((PROJECT / path).exists() for path in watched if path.startswith("kd/"))


def test_every_stage_watches_the_users_own_code(dag):
    assert all("${code}" in body(stage)["deps"] for stage in dag.values())


def test_a_manifests_code_version_covers_the_code_that_dvc_watches(dag):
    watched = {path for path in dag["teacher"]["deps"] if path.startswith("kd/")}
    assert watched == {f"kd/{name}" for name in artifacts.LEARNING}


def test_the_page_shows_the_layers_that_are_enforced():
    page = (PROJECT / "docs/architecture.md").read_text()
    rows = re.findall(r"^flows|^kd\.\w+(?: \| \w+)*", page, re.M)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    shown = [set(row.removeprefix("kd.").split(" | ")) for row in rows]
    assert shown == [set(layer.replace("kd.", "").split(" | ")) for layer in layers]


def test_imports_go_down_only():
    linter = Path(sys.executable).with_name("lint-imports")
    subprocess.run([linter, "--no-cache"], cwd=PROJECT, check=True, timeout=120)
