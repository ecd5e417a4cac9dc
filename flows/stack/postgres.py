"""Run PostgreSQL from the system's packages, with its data in the stack's folder."""

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
"""Seconds that it may take to answer: after a crash it first replays its write-ahead log."""


def url(settings: Settings, database: str, driver: str = "postgresql") -> str:
    """The URL at which a client reaches `database`, with the password."""
    login = f"{USER}:{settings.secret('postgres')}"
    return f"{driver}://{login}@127.0.0.1:{settings.postgres_port}/{database}"


def command(settings: Settings) -> list[str]:
    """The command that runs the server in the foreground."""
    options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
    return [
        *_as_user(settings),
        *(program("postgres"), "-D", str(_data(settings)), "-p", str(settings.postgres_port)),
        *options,
    ]


def prepare(settings: Settings) -> None:
    """Create the data folder if it does not exist.

    Raises:
        StackError: PostgreSQL is not installed, cannot reach the folder, or its initdb failed.
    """
    initdb, data = program("initdb"), _data(settings)
    _check_reachable(settings)
    if data.exists():
        return
    fresh, password = data.with_name("postgres.new"), data.with_name("postgres.password")
    if fresh.exists():
        shutil.rmtree(fresh)  # left by an attempt that was killed
    fresh.mkdir(mode=0o700)
    private(password, settings.secret("postgres"))
    if os.geteuid() == 0:
        for path in (fresh, password):
            shutil.chown(path, settings.postgres_user)
    options = ["--auth=scram-sha-256", f"--pwfile={password}", "--encoding=UTF8", "--no-locale"]
    done = subprocess.run(
        [*_as_user(settings), initdb, "-D", str(fresh), f"--username={USER}", *options],
        cwd="/",  # another user may not be allowed to enter the current folder
        capture_output=True,
        text=True,
        check=False,
    )
    password.unlink()
    if done.returncode:
        raise StackError(f"PostgreSQL's initdb failed:\n{done.stderr.strip()}")
    fresh.rename(data)


def make_databases(settings: Settings, check: Callable[[], None]) -> None:
    """Wait until the server answers, and create the databases that are missing.

    Args:
        settings: The stack.
        check: Called while waiting; raises if the server has failed.

    Raises:
        StackError: it does not answer, or has no extension pg_trgm.
    """
    with _connect(settings, "postgres", check) as server:
        present = {name for (name,) in server.execute("SELECT datname FROM pg_database")}
        for name in DATABASES:
            if name not in present:
                server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    with _connect(settings, "prefect", check) as prefect:
        try:
            prefect.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")  # for Prefect's searches
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
    """Find a program of PostgreSQL on PATH, else the newest one where Debian installs them."""
    versions = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    newest = sorted(versions, key=lambda path: int(path.parts[-3]))
    found = shutil.which(name) or (newest and str(newest[-1]))
    if not found:
        raise StackError(
            f"PostgreSQL's {name} was not found: install the package postgresql "
            "(Debian, Ubuntu) or postgresql-server and postgresql-contrib (Fedora)"
        )
    return found


def _as_user(settings: Settings) -> list[str]:
    """The command prefix that drops root for PostgreSQL, which refuses to run as root."""
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
            "whose parent directories everybody may enter"
        )
