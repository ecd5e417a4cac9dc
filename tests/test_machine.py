import json

import pytest
import torch

from kd import artifacts
from kd.machine import write_run_record


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_run_record_says_when_where_and_by_what():
    write_run_record("assistants/small", 0.0, "abc", None)
    record = json.loads((artifacts.ROOT / "runs/assistants/small.json").read_text())
    assert record["run_id"] == "abc"
    assert record["started"] == "1970-01-01T00:00:00+00:00"
    assert record["torch"] == torch.__version__
