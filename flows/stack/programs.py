"""The stack's programs, as configured for supervisord.

Supervisord starts them, restarts any that fails, rotates their logs and reports their state.  Each
runs on a leash (flows/leash.py) held by supervisord: if supervisord is killed, they all end with
it, and none is left holding a port.
"""

import configparser
import io
import os
import shlex
import sys
from pathlib import Path

from flows import leash
from flows.stack import postgres
from flows.stack.settings import USER, Settings, private

ORDER = ("postgres", "prefect", "mlflow", "worker")
"""They start in this order, and stop in reverse."""


def write(settings: Settings) -> Path:
    """Write supervisord's configuration, readable by this user only: it holds passwords."""
    folder = settings.folder
    commands = {
        "postgres": (postgres.command(settings), {}),
        "prefect": _prefect(settings),
        "mlflow": _mlflow(settings),
        "worker": _worker(settings),
    }
    parser = configparser.RawConfigParser()
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser["unix_http_server"] = {"file": _plain(socket(settings)), "chmod": "0700"}
    parser["supervisord"] = {
        "logfile": _plain(folder / "logs" / "supervisord.log"),
        "pidfile": _plain(folder / "supervisord.pid"),
        "childlogdir": _plain(folder / "logs"),
    }
    parser["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    for number, name in enumerate(ORDER):
        command, env = commands[name]
        held = [sys.executable, "-I", "-S", leash.__file__, *command]
        parser[f"program:{name}"] = {
            "command": _plain(shlex.join(held)),
            "directory": "/" if name == "postgres" else _plain(settings.root),
            "environment": ",".join(f'{key}="{_plain(env[key])}"' for key in env),
            "autostart": "false",
            "autorestart": "true",
            "startsecs": "2",
            "priority": str(number),
            "stopwaitsecs": str(int(leash.GRACE) + 5),
            "redirect_stderr": "true",
            "stdout_logfile": _plain(log(settings, name)),
            "stdout_logfile_maxbytes": "10MB",
            "stdout_logfile_backups": "2",
        }
    text = io.StringIO()
    parser.write(text)
    path = folder / "supervisord.conf"
    private(path, text.getvalue())
    return path


def socket(settings: Settings) -> Path:
    """The socket that supervisord listens on."""
    return settings.folder / "supervisord.sock"


def log(settings: Settings, name: str) -> Path:
    """The file with a program's output."""
    return settings.folder / "logs" / f"{name}.log"


def environment(settings: Settings) -> dict[str, str]:
    """Every program's environment: ours, without variables that point to another server."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PREFECT_", "MLFLOW_", "STACK_"))
    }
    return {
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")]),
        "PREFECT_HOME": str(settings.folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }


def _prefect(settings: Settings) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", settings.host]
    database = postgres.url(settings, "prefect", "postgresql+asyncpg")
    env = {
        "PREFECT_API_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_UI_API_URL": f"{settings.prefect}/api",
        "PREFECT_SERVER_API_AUTH_STRING": settings.prefect_login,
    }
    return [*command, "--port", str(settings.prefect_port)], env


def _mlflow(settings: Settings) -> tuple[list[str], dict[str, str]]:
    # The default takes 14 processes and 3 GB.
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", settings.host, "--port", str(settings.mlflow_port)]
    command += ["--artifacts-destination", str(settings.folder / "artifacts")]
    env = {
        "MLFLOW_BACKEND_STORE_URI": postgres.url(settings, "mlflow", "postgresql+psycopg"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    if settings.shared:
        names = dict.fromkeys([settings.name, settings.here])
        hosts = [f"{name}:{settings.mlflow_port}" for name in names]
        command += ["--allowed-hosts", ",".join(hosts), "--cors-allowed-origins", settings.mlflow]
    if settings.password:
        command += ["--app-name", "basic-auth"]
        env["MLFLOW_AUTH_CONFIG_PATH"] = str(_mlflow_logins(settings))
        env["MLFLOW_AUTH_ADMIN_PASSWORD"] = settings.password
        env["MLFLOW_FLASK_SERVER_SECRET_KEY"] = settings.secret("mlflow")
    return command, env


def _mlflow_logins(settings: Settings) -> Path:
    path = settings.folder / "mlflow-auth.ini"
    database = postgres.url(settings, "mlflow_auth", "postgresql+psycopg")
    lines = [
        "[mlflow]",
        "default_permission = READ",
        f"database_uri = {database}",
        f"admin_username = {USER}",
    ]
    private(path, "\n".join([*lines, ""]))
    return path


def _worker(settings: Settings) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process"]
    command += ["--pool", settings.pool, "--name", "stack", "--limit", "1"]  # one flow per clone
    return command, settings.clients()


def _plain(value: object) -> str:
    """Escape %, which supervisord's configuration files interpret."""
    return str(value).replace("%", "%%")
