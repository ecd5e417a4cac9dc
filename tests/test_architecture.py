"""The rules of docs/architecture.md that a machine can hold us to."""

import re
import subprocess
import sys
from pathlib import Path

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
        ("optuna", {"kd/weightings/de_sampler.py"}),
        ("yaml", {"kd/params.py"}),
        ("pydantic", {"kd/params.py"}),
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


def test_stages_watch_the_code_that_they_run(dag):
    for stage in dag.values():
        for path in paths(body(stage)["deps"]):
            assert "${" in path or path.startswith("artifacts") or (PROJECT / path).exists(), path


def test_a_manifests_code_version_covers_the_code_that_dvc_watches(dag):
    watched = {path for path in dag["teacher"]["deps"] if path.startswith("kd/")}
    assert watched == {f"kd/{name}" for name in artifacts.LEARNING}


def test_imports_go_down_only():
    linter = Path(sys.executable).with_name("lint-imports")
    subprocess.run([linter, "--no-cache"], cwd=PROJECT, check=True, timeout=120)
