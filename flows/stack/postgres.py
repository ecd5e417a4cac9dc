"""PostgreSQL from the system's packages, with its data in the stack's folder."""

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from flows.stack.settings import Settings, StackError, private

USER = "kd"
DATABASES = ("prefect", "mlflow", "mlflow_auth")
PATIENCE = 60.0
"""Seconds until it answers: after a crash it first replays its log."""


def url(settings: Settings, database: str, driver: str = "postgresql") -> str:
    """Where a client finds `database`."""
    login = f"{USER}:{settings.secret('postgres')}"
    return f"{driver}://{login}@127.0.0.1:{settings.postgres_port}/{database}"


def command(settings: Settings) -> list[str]:
    """The server, in the foreground."""
    options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
    return [
        *_as_user(settings),
        *(program("postgres"), "-D", str(_data(settings)), "-p", str(settings.postgres_port)),
        *options,
    ]


def prepare(settings: Settings) -> None:
    """Make the data folder, once.

    Raises:
        StackError: PostgreSQL is not installed, or its user cannot reach the folder.
    """
    initdb, data = program("initdb"), _data(settings)
    _check_reachable(settings)
    if data.exists():
        return
    fresh, password = data.with_name("postgres.new"), data.with_name("postgres.password")
    if fresh.exists():
        shutil.rmtree(fresh)  # of an attempt that was killed
    fresh.mkdir(mode=0o700)
    private(password, settings.secret("postgres"))
    if os.geteuid() == 0:
        for path in (fresh, password):
            shutil.chown(path, settings.postgres_user)
    options = ["--auth=scram-sha-256", f"--pwfile={password}", "--encoding=UTF8", "--no-locale"]
    done = subprocess.run(
        [*_as_user(settings), initdb, "-D", str(fresh), f"--username={USER}", *options],
        cwd="/",  # as another user it may not be allowed to be here
        capture_output=True,
        text=True,
        check=False,
    )
    password.unlink()
    if done.returncode:
        raise StackError(f"PostgreSQL's initdb failed:\n{done.stderr.strip()}")
    fresh.rename(data)


def make_databases(settings: Settings, check: Callable[[], None]) -> None:
    """Wait until the server answers, and make what is missing.

    Args:
        settings: The stack.
        check: Called while waiting; raises when there is nothing to wait for.

    Raises:
        StackError: it does not answer, or refuses.
    """
    with _connect(settings, "postgres", check) as server:
        present = {name for (name,) in server.execute("SELECT datname FROM pg_database")}
        for name in DATABASES:
            if name not in present:
                server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    with _connect(settings, "prefect", check) as prefect:
        try:
            prefect.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")  # Prefect's searches
        except psycopg.Error as error:
            raise StackError(
                f"PostgreSQL has no pg_trgm ({error}): install postgresql-contrib"
            ) from None


def _connect(
    settings: Settings, database: str, check: Callable[[], None]
) -> psycopg.Connection[tuple[Any, ...]]:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return psycopg.connect(url(settings, database), autocommit=True)
        except psycopg.OperationalError as error:
            check()
            if time.monotonic() > deadline:
                raise StackError(f"PostgreSQL does not answer: {error}") from None
            time.sleep(0.2)


def _data(settings: Settings) -> Path:
    return settings.folder / "postgres"


def program(name: str) -> str:
    """From the path, or from where Debian keeps what it does not put there; the newest version."""
    versions = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    newest = sorted(versions, key=lambda path: int(path.parts[-3]))
    found = shutil.which(name) or (newest and str(newest[-1]))
    if not found:
        raise StackError(
            f"PostgreSQL's {name} is not here: install the package postgresql "
            "(Debian, Ubuntu) or postgresql-server and postgresql-contrib (Fedora)"
        )
    return found


def _as_user(settings: Settings) -> list[str]:
    """What stands before a command of PostgreSQL's, which refuses to be root."""
    if os.geteuid():
        return []
    user = settings.postgres_user
    try:
        group = pwd.getpwnam(user).pw_gid
    except KeyError:
        raise StackError(
            f"PostgreSQL does not run as root, and there is no user {user}: start the stack as "
            "another user, or name an unprivileged one by STACK_POSTGRES_USER in infra/stack.env"
        ) from None
    setpriv = shutil.which("setpriv")
    if not setpriv:
        raise StackError("PostgreSQL does not run as root: start the stack as another user")
    return [setpriv, "--reuid", user, "--regid", str(group), "--init-groups", "--"]


def _check_reachable(settings: Settings) -> None:
    test = [*_as_user(settings), "test", "-x", str(settings.folder)]
    if subprocess.run(test, cwd="/", check=False).returncode:
        raise StackError(
            f"the user {settings.postgres_user}, who runs PostgreSQL for root, may not enter "
            f"{settings.folder}: start the stack as another user, or set STACK_FOLDER to a folder "
            "below directories that everybody may enter"
        )
