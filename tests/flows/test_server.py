"""Prefect's server: what it needs of the libraries under it, and whom it listens to."""

import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from flows import child, server
from tests.flows.toys import wait_until


def test_a_schedule_makes_runs(prefect: str) -> None:
    """With SQLAlchemy 2.1 the server of Prefect 3.8 logs an error here, and starts nothing."""

    def ask(path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{prefect}/{path}", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
        time.sleep(3)  # its database was busy, and it says to ask again
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    flow = ask("flows/", name="scheduled")
    schedule = {"active": True, "schedule": {"interval": 3600}}
    made = ask("deployments/", name="hourly", flow_id=flow["id"], schedules=[schedule])
    planned = {"deployments": {"id": {"any_": [made["id"]]}}}
    run = wait_until(lambda: ask("flow_runs/filter", **planned))[0]
    assert (run["state_type"], run["auto_scheduled"]) == ("SCHEDULED", True)


@pytest.mark.parametrize(
    ("page", "allowed"),
    [
        ("http://evil.example", None),
        (server.PAGES, server.PAGES),
        ("http://localhost:4200", "http://localhost:4200"),
    ],
)
def test_no_other_web_page_reads_its_answers(prefect: str, page: str, allowed: str | None) -> None:
    request = urllib.request.Request(f"{prefect}/admin/version", headers={"Origin": page})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["Access-Control-Allow-Origin"] == allowed


@pytest.mark.parametrize("own", [{}, {"NO_PROXY": "host.example"}, {"no_proxy": "*"}])
def test_no_proxy_is_asked_for_it(
    prefect: str, monkeypatch: pytest.MonkeyPatch, own: dict[str, str]
) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    server.bypass_proxy()
    assert server.answers(f"{prefect}/health")
    assert all(value in os.environ[name] for name, value in own.items())


def test_why_it_did_not_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_UI_URL"):
        monkeypatch.setenv(name, "")  # which the server's start replaces
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    server.configure(tmp_path)
    (tmp_path / "prefect.db").write_bytes(b"no database" * 1000)
    own = server.Server(tmp_path)
    with pytest.raises(server.NoServerError, match="file is not a database"):
        own.wait()
    child.end(own.process)
