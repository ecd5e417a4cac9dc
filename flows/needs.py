"""What remote workers need, said before anything is handed out: they see git, the DVC remote and
the servers, and nothing else of this machine.
"""

import os
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from dvc.fs import HTTPFileSystem
from dvc.repo import Repo

from kd import git


class WorkersCannotError(Exception):
    """Remote workers could not do this; the message names the remedy."""


def check(root: Path) -> str:
    """The commit that workers are to run.

    Raises:
        WorkersCannotError: see there.
        dvc.exceptions.DvcException: the DVC remote's settings are wrong.
    """
    commit = _commit(root)
    _check_remote(root)
    _check_tracking(root)
    return commit


def _commit(root: Path) -> str:
    found = git.state(root)
    if found is None:
        raise WorkersCannotError("workers check out a commit, and here is none: commit first")
    commit, dirty = found
    if dirty:
        names = [line.split(maxsplit=1)[-1] for line in git.changed(root)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise WorkersCannotError(
            f"workers check out the commit, and cannot see what differs from it: "
            f"{', '.join(names[:3])}{more}: commit, or run without --remote"
        )
    if git.ask(root, "remote") and not git.ask(root, "branch", "--remotes", "--contains", commit):
        raise WorkersCannotError(
            f"workers cannot fetch commit {commit[:12]}, which is in no branch of a git remote: "
            "`git push` first"
        )
    return commit


def _check_remote(root: Path) -> None:
    with Repo(str(root)) as repo:
        name = repo.config["core"].get("remote")
        if not name:
            raise WorkersCannotError(
                "workers get data and give results through a DVC remote, and none is set: "
                "`dvc remote add --default NAME URL`, and commit .dvc/config"
            )
        if isinstance(repo.cloud.get_remote(name).fs, HTTPFileSystem):
            raise WorkersCannotError(
                f"DVC remote {name} is reached by HTTP, over which DVC has no run-cache, and "
                "results come back through that: use S3, SSH, another storage, or a folder"
            )


def _check_tracking(root: Path) -> None:
    params = root / "params.yaml"
    # As kd reads it, in YAML 1.1: `yes` is a word to DVC, and stages would track.
    if params.exists() and (yaml.safe_load(params.read_text()) or {}).get("tracking") is False:
        return
    uri = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if not uri.scheme or uri.scheme in ("sqlite", "file"):
        raise WorkersCannotError(
            "workers cannot reach MLflow's data on this machine: set MLFLOW_TRACKING_URI to a "
            "server's address, or `tracking: false` in params.yaml"
        )
    if "@" in uri.netloc:
        raise WorkersCannotError(
            "MLFLOW_TRACKING_URI holds a password, and would be shown in Prefect: give it to the "
            "workers as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
