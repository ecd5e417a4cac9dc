"""What git says about the running code."""

import subprocess
from pathlib import Path


def state(root: Path) -> tuple[str, bool] | None:
    """The commit, and whether files differ from it; None if there is no git or no commit."""
    commit = ask(root, "rev-parse", "HEAD")
    if not commit:
        return None
    return commit, bool(changed(root))


def changed(root: Path) -> list[str]:
    """The files that differ from the commit, as `git status` lists them.

    dvc.lock does not count, because the pipeline itself writes it.
    """
    return ask(root, "status", "--porcelain", "--", ".", ":!dvc.lock").splitlines()


def ask(root: Path, *words: str) -> str:
    """What `git WORDS` prints; "" if it fails or git is not installed."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
