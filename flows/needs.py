"""Check that remote workers can run the stages, before any is handed out.

Workers reach git, the DVC remote and the servers, and nothing else on this machine.
"""

import os
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from dvc.fs import HTTPFileSystem
from dvc.repo import Repo

from kd import git


class WorkersCannotError(Exception):
    """Remote workers could not run these stages; the message names the remedy."""


def check(root: Path) -> str:
    """Check everything that workers need, and return the commit they will run.

    Raises:
        WorkersCannotError: something is missing.
        dvc.exceptions.DvcException: the DVC remote is misconfigured.
    """
    commit = _commit(root)
    _check_remote(root)
    _check_tracking(root)
    return commit


def _commit(root: Path) -> str:
    found = git.state(root)
    if found is None:
        raise WorkersCannotError(
            "workers check out a commit, and git names none: commit first, or see `git status`"
        )
    commit, dirty = found
    if dirty:
        names = [line.split(maxsplit=1)[-1] for line in git.changed(root)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise WorkersCannotError(
            f"workers check out the commit and do not see uncommitted changes to "
            f"{', '.join(names[:3])}{more}: commit, or run without --remote"
        )
    if git.ask(root, "remote") and not git.ask(root, "branch", "--remotes", "--contains", commit):
        raise WorkersCannotError(
            f"workers cannot fetch commit {commit[:12]}, which is on no branch of a git remote: "
            "`git push` first"
        )
    return commit


def _check_remote(root: Path) -> None:
    with Repo(str(root)) as repo:
        name = repo.config["core"].get("remote")
        if not name:
            raise WorkersCannotError(
                "workers exchange data and results through a DVC remote, and none is set: "
                "`dvc remote add --default NAME URL`, and commit .dvc/config"
            )
        if isinstance(repo.cloud.get_remote(name).fs, HTTPFileSystem):
            raise WorkersCannotError(
                f"DVC remote {name} is reached by HTTP, over which DVC has no run-cache, and "
                "results come back through the run-cache: use S3, SSH, another storage, or a "
                "folder"
            )


def _check_tracking(root: Path) -> None:
    uri = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if "@" in uri.netloc:  # workers are told it in any case
        raise WorkersCannotError(
            "MLFLOW_TRACKING_URI holds a password, which Prefect would show: pass it to the "
            "workers as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        )
    params = root / "params.yaml"
    # Read as YAML 1.1, like kd does; DVC would take `no` for a string.
    if (
        params.exists()
        and (yaml.safe_load(params.read_text("utf-8")) or {}).get("tracking") is False
    ):
        return
    if not uri.scheme or uri.scheme in ("sqlite", "file"):
        raise WorkersCannotError(
            "workers cannot reach the MLflow data on this machine: set MLFLOW_TRACKING_URI to a "
            "server's address, or `tracking: false` in params.yaml"
        )
