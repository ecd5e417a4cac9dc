"""Trace a file from its checksum back to student, teachers, data, code and commit.

    kd lineage artifacts/exports/onnx/model.onnx
    kd lineage 3f786850e387550fdab836ed7e6dc881de23001b5a9f2c1d8e7f6a5b4c3d2e1f

Everything is read from the records beside the files; only checksums are computed.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd import artifacts, git, manifest
from kd.artifacts import ArtifactError
from kd.build import read_yaml
from kd.component import ConfigError
from kd.disk import digest
from kd.manifest import Manifest
from kd.workspace import check_root

LOCK = Path("dvc.lock")
CHECKSUM = re.compile("[0-9a-fA-F]{64}")
SHOWN = 16
"""Characters shown of any checksum but that of the file asked about."""


@dataclass(frozen=True)
class Found:
    """A file of this workspace, found by its checksum."""

    run_name: str
    """The stage that made it: exports/onnx, student, assistants/large."""
    network: Manifest
    """The network that it is, or was exported from."""
    verified: str = ""
    """For an export, how it compared with its network."""


def tell(file: Path) -> str:
    """The lineage of an exported file, a bundle or a model.safetensors, as text.

    Args:
        file: Its path, or its SHA-256 if the file is elsewhere.

    Raises:
        ConfigError: there is no such file, no record in this workspace has its checksum, or
            this is not a workspace.
    """
    sha256 = _checksum(file)
    found = find(sha256)
    if found is None:
        if not artifacts.ROOT.exists():
            check_root()
        raise ConfigError(
            f"{file} (SHA-256 {sha256}) matches no record in {artifacts.ROOT.resolve()}: it was "
            "made elsewhere, changed since, or made before the last run of its stage (check out "
            "the commit whose dvc.lock had it, then `dvc checkout`). MLflow finds it by the tag "
            "kd.export_sha256"
        )
    lines = [f"{file}", f"SHA-256 {sha256}", "", *_chain(found), "", *_data(found.network), ""]
    return "\n".join([*lines, *_settings(found.network), "", *_made(found)])


def _checksum(file: Path) -> str:
    """SHA-256 of a file or of a bundle's model, or one given instead."""
    if not file.exists():
        if CHECKSUM.fullmatch(file.name):
            return file.name.lower()
        raise ConfigError(f"{file} does not exist (name a file, a bundle, or a SHA-256 in full)")
    record = file / "parity.json"
    if record.exists():
        file = file / str(artifacts.read_json(record)["file"])
    try:
        return digest(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error


def find(sha256: str) -> Found | None:
    """The export or trained network with this checksum, if this workspace has it."""
    for path in sorted(artifacts.ROOT.glob("exports/*/parity.json")):
        parity = artifacts.read_json(path)
        if parity.get("sha256") == sha256:
            verified = (
                f"{parity['file']}, {parity['size_bytes']:,} bytes; on {parity['num_images']} "
                f"validation images accuracy {parity['val_accuracy']:.4f}, "
                f"top-1 agreement {parity['top1_agreement']:.4f}"
            )
            return Found(_run_name(path), manifest.read(path.parent, "student.json"), verified)
    for path in sorted(artifacts.ROOT.rglob("manifest.json")):
        if artifacts.read_json(path).get("sha256") == sha256:
            return Found(_run_name(path), manifest.read(path.parent))
    return None


def _run_name(record: Path) -> str:
    return record.parent.relative_to(artifacts.ROOT).as_posix()


def _chain(found: Found) -> Iterator[str]:
    """Who taught whom, one line per network, with its teachers indented below it."""
    if found.verified:
        yield f"{found.run_name}: {found.verified}"
    yield from _network(found.network, "  " if found.verified else "")


def _network(network: Manifest, indent: str, weight: str = "") -> Iterator[str]:
    model = ", ".join(f"{key} {value}" for key, value in network.model.items() if key != "kind")
    yield (
        f"{indent}{weight}{network.name}  {network.sha256[:SHOWN]}  "
        f"{network.model['kind']} ({model}), code {network.code[:SHOWN]}"
    )
    for teacher, share in zip(network.teachers, network.weights_K, strict=True):
        shown = f"{share:.4f} x "
        present = _present(teacher.name)
        if present is not None and present.sha256 == teacher.sha256:
            yield from _network(present, f"{indent}  ", shown)
        else:
            gone = "another one is here now" if present else "not here"
            yield f"{indent}  {shown}{teacher.name}  {teacher.sha256[:SHOWN]}  ({gone})"
    if not network.teachers:
        yield f"{indent}  labels alone"


def _present(run_name: str) -> Manifest | None:
    """The network that now has a run name, if any."""
    try:
        return manifest.read(artifacts.ROOT / run_name)
    except ArtifactError:
        return None


def _data(network: Manifest) -> Iterator[str]:
    yield f"data  {network.data_hash}"
    path = artifacts.DATA / "data.json"
    record = artifacts.read_json(path) if path.exists() else {}
    if record.get("data_hash") != network.data_hash:
        yield "  (other data is here now)"
        return
    counts = ", ".join(f"{name} {split['count']:,}" for name, split in record["splits"].items())
    yield f"  {_flat(record['dataset'])}; {counts}"


def _settings(network: Manifest) -> Iterator[str]:
    yield f"params of {network.name}"
    yield f"  method {_flat(network.method)}"
    yield f"  recipe {_flat(network.recipe)}"
    yield f"  seed {network.seed}, mixing {network.mixing}, torch {network.torch}"


def _flat(record: Mapping[str, Any] | None) -> str:
    return json.dumps(record, ensure_ascii=False)


def _made(found: Found) -> Iterator[str]:
    """When and from which commit it was made, and its hashes in DVC."""
    names = dict.fromkeys([found.run_name, found.network.name])
    for name in names:
        path = artifacts.ROOT / "runs" / f"{name}.json"
        record = artifacts.read_json(path) if path.exists() else {}
        commit = record.get("commit") or "no commit"
        changed = " with uncommitted changes" if record.get("dirty") else ""
        yield f"{name} made {record.get('started', 'at a time unknown')} at {commit}{changed}"
        if url := record.get("url"):
            yield f"  {url}"
        for out, md5 in _locked(name).items():
            since = git.ask(Path(), "log", "--format=%h", f"-S{md5}", "--", str(LOCK)).split()
            committed = f", in dvc.lock since {since[-1]}" if since else ", dvc.lock not committed"
            yield f"  {out}  md5 {md5}{committed}"


def _locked(run_name: str) -> dict[str, str]:
    """DVC's hash of each output of a stage but its run record; empty if DVC did not run it."""
    if not LOCK.exists():
        return {}
    stage = read_yaml(LOCK).get("stages", {}).get(run_name.replace("/", "@"), {})
    outs = {out["path"]: out["md5"] for out in stage.get("outs", ())}
    return {path: md5 for path, md5 in outs.items() if "/runs/" not in path}
