"""`kd lineage`: from a file's checksum back to all that made it."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kd import artifacts, lineage
from kd.__main__ import run
from kd.exporters import Onnx
from kd.machine import write_run_record
from kd.manifest import Origin
from tests.bundle.toys import DATA, bundled, network

MD5 = "2605e9ac815542ecbba9b4c827a68017.dir"
"""Begins like a number with an exponent."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher, an assistant of its, a student of that assistant and another, an export."""
    root = tmp_path_factory.mktemp("lineage") / "artifacts"
    alone = {"teachers": (), "weights_K": (), "method": None}
    _, teacher = network(root / "teacher", 1, name="teacher", role="teacher", **alone)
    below = {"teachers": (Origin(name="teacher", sha256=teacher.sha256),), "weights_K": (1.0,)}
    _, a = network(root / "assistants/a", 2, name="assistants/a", role="assistant", **below)
    origins = Origin(name="assistants/a", sha256=a.sha256), Origin(name="assistants/b", sha256="b")
    bundled(root, Onnx(), teachers=origins)
    (root / "data").mkdir()
    (root / "data/data.json").write_text(json.dumps(DATA))
    return root.parent


@pytest.fixture
def workspace(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "dvc.lock").write_text(
        "stages:\n  exports@onnx:\n    outs:\n"
        f"    - {{path: artifacts/exports/onnx, md5: {MD5}}}\n"
        "    - {path: artifacts/runs/exports/onnx.json, md5: ee}\n"
    )
    for words in (["init", "-q"], ["add", "dvc.lock"], ["commit", "-qm", "a run"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    write_run_record("exports/onnx", 0.0, None, None)
    return tmp_path


def commit(folder):
    words = ["git", "rev-parse", "HEAD"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True).stdout.strip()


def test_an_export_leads_back_to_its_teachers_data_commit_and_hashes(workspace, capsys):
    assert run(["lineage", "artifacts/exports/onnx/model.onnx"]) == 0
    said = capsys.readouterr().out
    described = f"{'#' * 16}  plain_cnn (depth 2), code {'c' * 16}"
    assert re.sub(r"\b[0-9a-f]{16}  plain", f"{'#' * 16}  plain", said).splitlines()[3:10] == [
        "exports/onnx: model.onnx, "
        f"{Path('artifacts/exports/onnx/model.onnx').stat().st_size:,} bytes; "
        "on 40 validation images accuracy 0.7500, top-1 agreement 1.0000",
        f"  student  {described}",
        f"    0.7500 x assistants/a  {described}",
        f"      1.0000 x teacher  {described}",
        "        labels alone",
        "    0.2500 x assistants/b  b  (not here)",
        "",
    ]
    assert f"data  {DATA['data_hash']}" in said
    assert '{"kind": "toys"}; train 12, val 40' in said
    assert f"at {commit(workspace)} with uncommitted changes" in said
    assert f"artifacts/exports/onnx  md5 {MD5}, in dvc.lock since {commit(workspace)[:7]}" in said
    assert "onnx.json" not in said


def test_a_copy_elsewhere_is_known_by_its_checksum(workspace, tmp_path):
    copy = shutil.copy("artifacts/exports/onnx/model.onnx", tmp_path / "from-a-phone.bin")
    assert "exports/onnx: model.onnx" in lineage.tell(artifacts.Path(copy))


def test_a_trained_network_has_a_lineage_too(workspace):
    said = lineage.tell(artifacts.Path("artifacts/assistants/a/model.safetensors"))
    assert "1.0000 x teacher" in said
    assert "exports/onnx" not in said


def test_a_teacher_that_was_trained_again_is_not_taken_for_the_one_who_taught(workspace):
    network(workspace / "artifacts/teacher", 9, name="teacher", role="teacher", teachers=())
    said = lineage.tell(artifacts.Path("artifacts/exports/onnx/model.onnx"))
    assert "(another one is here now)" in said


def test_an_unknown_file_is_said_to_be_unknown(workspace, capsys):
    (workspace / "other.onnx").write_text("other")
    assert run(["lineage", "other.onnx"]) == 2
    assert "matches no record in" in capsys.readouterr().err
    assert run(["lineage", "gone.onnx"]) == 2
    assert "gone.onnx does not exist" in capsys.readouterr().err
    assert run(["lineage", "0" * 64]) == 2
    assert "matches no record in" in capsys.readouterr().err


def test_from_a_folder_below_one_is_sent_to_the_projects_root(workspace, monkeypatch, capsys):
    monkeypatch.chdir("artifacts/exports/onnx")
    assert run(["lineage", "model.onnx"]) == 2
    assert capsys.readouterr().err.endswith("/onnx: run from the project's root\n")


def test_a_bundle_and_a_checksum_lead_to_the_same_as_the_file(workspace, tmp_path):
    file = artifacts.Path("artifacts/exports/onnx/model.onnx")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    told = lineage.tell(file).splitlines()
    assert told[1] == f"SHA-256 {sha256}"
    for other in (file.parent, artifacts.Path(sha256), artifacts.Path(sha256.upper())):
        assert lineage.tell(other).splitlines()[1:] == told[1:]


def test_a_changed_file_is_not_taken_for_the_one_that_was_recorded(workspace, capsys):
    file = artifacts.Path("artifacts/exports/onnx/model.onnx")
    file.write_bytes(file.read_bytes() + b"\0")
    assert run(["lineage", str(file.parent)]) == 2
    assert "changed since" in capsys.readouterr().err


def test_the_run_in_mlflow_is_named(workspace):
    write_run_record("exports/onnx", 0.0, "id", "http://there/#/runs/id")
    assert "\n  http://there/#/runs/id\n" in lineage.tell(artifacts.Path("artifacts/exports/onnx"))


def test_without_git_and_dvc_the_records_still_tell(made, monkeypatch):
    monkeypatch.chdir(made)
    said = lineage.tell(artifacts.Path("artifacts/exports/onnx/model.onnx"))
    assert "made at a time unknown at no commit" in said
