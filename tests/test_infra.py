"""What describes servers for machines that are not here, held against its own specification."""

import json
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml
from dotenv import dotenv_values

from flows import server

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="of the extra dev")
pytest.importorskip("check_jsonschema", reason="of the extra dev")
PROJECT = Path(__file__).parents[1]
INFRA = PROJECT / "infra"
LATEST = kubernetes_validate.latest_version()


def documents(path):
    return list(yaml.safe_load_all(path.read_text()))


def test_the_compose_file_keeps_to_the_compose_specification():
    schema = json.loads(
        (
            files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
        ).read_text()
    )
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    jsonschema.validate(compose, schema)
    with pytest.raises(jsonschema.ValidationError, match="imagee"):
        jsonschema.validate({**compose, "services": {"one": {"imagee": ""}}}, schema)


def test_the_compose_file_reads_what_stack_env_says_or_asks_for_it():
    used = re.findall(r"\$\{(\w+)(:?[?-]?)", (INFRA / "compose.yaml").read_text())
    asked_for = {name for name, how in used if how == ":?"}
    assert asked_for == {"STACK_PASSWORD", "STACK_SECRET"}
    assert {name for name, _ in used} - asked_for <= dotenv_values(INFRA / "stack.env").keys()


def test_the_compose_files_workers_do_one_flow_at_a_time_as_their_clone_bears():
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    workers = [each["command"] for name, each in services.items() if name.startswith("worker")]
    assert [command[-2:] for command in workers] == [["--limit", "1"]] * 2


def test_the_dockerfile_passes_hadolint():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, INFRA / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_images_hold_nothing_that_git_ignores():
    def patterns(name, folder=""):
        lines = (PROJECT / name).read_text().split("\n")
        return {folder + each.strip("/") for each in lines if each and not each.startswith("#")}

    left_out = {each.removeprefix("**/") for each in patterns(".dockerignore")}
    assert patterns(".gitignore") | patterns(".dvc/.gitignore", ".dvc/") <= left_out


@pytest.mark.parametrize(
    "path",
    [
        each
        for each in sorted((INFRA / "kubernetes").glob("*.yaml"))
        if each.stem != "kustomization"
    ],
    ids=lambda path: path.stem,
)
def test_manifests_keep_to_the_schemas_of_kubernetes(path):
    for document in documents(path):
        kubernetes_validate.validate(document, LATEST, strict=True)


def test_a_mistake_in_a_manifest_would_be_seen():
    manifest = documents(INFRA / "kubernetes" / "register.yaml")[0]
    manifest["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="comand"):
        kubernetes_validate.validate(manifest, LATEST, strict=True)


def test_every_manifest_is_part_of_the_kustomization():
    folder = INFRA / "kubernetes"
    (kustomization,) = documents(folder / "kustomization.yaml")
    present = {each.name for each in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == present


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_the_kustomization_builds():
    built = subprocess.run(
        ["kubectl", "kustomize", INFRA / "kubernetes"], capture_output=True, text=True, check=True
    ).stdout
    for document in yaml.safe_load_all(built):
        kubernetes_validate.validate(document, LATEST, strict=True)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "kd"


PATIENCE_OF = """
import sys, yaml
from prefect.events.schemas.automations import AutomationCore
(zombies,) = yaml.safe_load(open(sys.argv[1]))["automations"]
print(AutomationCore.model_validate(zombies).trigger.within.total_seconds())
"""


def test_prefect_takes_the_automations_and_our_flows_beat_often_enough():
    # In a process of its own: tests/flows/conftest.py must be the first to import Prefect.
    command = [sys.executable, "-c", PATIENCE_OF, INFRA / "automations.yaml"]
    patience = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(patience) >= 3 * int(server.HEARTBEAT)
    assert f"HEARTBEAT_FREQUENCY={server.HEARTBEAT}" in (INFRA / "Dockerfile").read_text()


def test_docker_and_kubernetes_make_the_databases_of_the_stack():
    statements = (INFRA / "kubernetes" / "databases.sql").read_text()
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    assert compose["configs"]["databases"]["content"] == statements
    made = re.findall(r"CREATE DATABASE (\w+);", statements)
    postgres = pytest.importorskip("flows.stack.postgres", exc_type=ImportError)
    assert tuple(made) == postgres.DATABASES
