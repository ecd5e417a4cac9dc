"""The settings in infra/stack.env, validated, and what is derived from them."""

import ipaddress
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from dotenv import dotenv_values

from flows import server

FILE = Path("infra", "stack.env")
PASSWORD = re.compile(r"[\w.+=-]{12,}", re.ASCII)
"""MLflow requires twelve characters; these need no escaping in shells, URLs and configuration
files, into which infra/compose.yaml and infra/kubernetes insert them as they are."""
USER = "admin"


class StackError(Exception):
    """The stack cannot do what was asked; the message names the remedy."""


@dataclass(frozen=True)
class Settings:
    """One stack: where it listens and where it keeps its data."""

    root: Path
    host: str
    name: str
    prefect_port: int
    mlflow_port: int
    postgres_port: int
    folder: Path
    pool: str
    postgres_user: str
    password: str

    @property
    def shared(self) -> bool:
        """Whether other machines can reach it."""
        return not _address(self.host).is_loopback

    @property
    def prefect(self) -> str:
        """The URL of Prefect's UI."""
        return f"http://{self.name}:{self.prefect_port}"

    @property
    def mlflow(self) -> str:
        """The URL of MLflow's UI."""
        return f"http://{self.name}:{self.mlflow_port}"

    @property
    def here(self) -> str:
        """The address at which this machine reaches the servers."""
        return _here(self.host)

    @property
    def prefect_login(self) -> str:
        """What Prefect always asks for: the worker runs whatever a client sends, and other users
        of this machine, and pages in the browser, reach 127.0.0.1 too.
        """
        return f"{USER}:{self.password or self.secret('prefect')}"

    def clients(self) -> dict[str, str]:
        """The environment variables that clients of the stack need."""
        env = {
            "PREFECT_API_URL": f"{self.prefect}/api",
            "PREFECT_API_AUTH_STRING": self.prefect_login,
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": server.HEARTBEAT,
            "MLFLOW_TRACKING_URI": self.mlflow,
        }
        if self.password:
            env["MLFLOW_TRACKING_USERNAME"] = USER
            env["MLFLOW_TRACKING_PASSWORD"] = self.password
        return env

    def secret(self, name: str) -> str:
        """A password for use between the stack's own programs, created on first use."""
        path = self.folder / "secrets" / name
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            private(path, secrets.token_urlsafe(24))
        return path.read_text()


def private(path: Path, text: str) -> None:
    """Write a file that only this user may read."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600)
    fresh.write_text(text)
    fresh.replace(path)


def read(root: Path) -> Settings:
    """The stack of the project in `root`.

    Raises:
        StackError: infra/stack.env, or a STACK_ variable in the environment, is wrong.
    """
    if not (root / FILE).exists():
        raise StackError(f"{FILE} is missing: run this in the project's folder")
    values = {key: value or "" for key, value in dotenv_values(root / FILE).items()}
    values |= {key: os.environ[key] for key in values if key in os.environ}
    try:
        host = str(_address(values.pop("STACK_HOST")))
        settings = Settings(
            root=root,
            host=host,
            name=values.pop("STACK_NAME") or _here(host),
            prefect_port=_port("STACK_PREFECT_PORT", values),
            mlflow_port=_port("STACK_MLFLOW_PORT", values),
            postgres_port=_port("STACK_POSTGRES_PORT", values),
            folder=root / values.pop("STACK_FOLDER"),
            pool=values.pop("STACK_POOL"),
            postgres_user=values.pop("STACK_POSTGRES_USER"),
            password=_password(os.environ.get("STACK_PASSWORD", "")),
        )
    except KeyError as missing:
        raise StackError(f"{FILE} has no {missing.args[0]}") from None
    if values:
        raise StackError(f"{FILE} has {', '.join(values)}, which nothing reads")
    return settings


def _here(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host


def _port(key: str, values: dict[str, str]) -> int:
    text = values.pop(key)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise StackError(f"{FILE}: {key} is {text!r}; a port is a number up to 65535")
    return int(text)


def refuse_open_doors(settings: Settings) -> None:
    """Refuse to let other machines in without a password, or without a name to reach this one by.

    Raises:
        StackError: STACK_PASSWORD or STACK_NAME is missing.
    """
    if not settings.shared:
        return
    if not settings.password:
        raise StackError(
            f"{FILE}: STACK_HOST is {settings.host}, so other machines can reach Prefect and "
            "MLflow, and both run what they are sent: give STACK_PASSWORD in the environment, or "
            "keep to 127.0.0.1"
        )
    if settings.name == settings.here != settings.host:
        raise StackError(
            f"{FILE}: STACK_HOST is {settings.host}, so STACK_NAME is needed: "
            "the name or address at which other machines reach this one"
        )


def _address(host: str) -> ipaddress.IPv4Address:
    try:
        return ipaddress.IPv4Address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise StackError(
            f"{FILE}: STACK_HOST is {host!r}; it must be an IPv4 address of this machine, or "
            "0.0.0.0"
        ) from None


def _password(text: str) -> str:
    if text and not PASSWORD.fullmatch(text):
        raise StackError(
            "STACK_PASSWORD needs at least twelve characters: letters, digits and . _ + = -"
        )
    return text
