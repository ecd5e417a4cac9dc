"""A comparison as a flow: units in their order, each in a process of its own, and the table."""

from pathlib import Path

import pytest

from tests.flows.toys import FOREIGN_WARNINGS
from tests.test_compare import PROJECT, RAW, written

pytestmark = [FOREIGN_WARNINGS, pytest.mark.slow]


def test_the_flow_does_what_is_left_and_returns_the_table(
    tmp_path: Path, prefect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.compare_flow import compare, left

    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    written(tmp_path, cells={name: RAW["cells"][name] for name in ("labels", "kd")})
    units = left("params.compare.yaml", tmp_path)
    assert next(iter(units)) == "seed-0/data"
    assert "seed-1/teacher" in units["seed-1/baselines/kd"]
    table = compare("params.compare.yaml", str(tmp_path))
    assert "| labels |" in table
    assert left("params.compare.yaml", tmp_path) == {}

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        assert [each.data for each in client.read_artifacts() if each.key == "comparison"] == [
            table
        ]


@pytest.mark.usefixtures("prefect")
def test_a_file_that_is_no_comparison_is_refused(tmp_path: Path) -> None:
    from flows.compare_flow import left

    written(tmp_path, cells={})
    with pytest.raises(ValueError, match=r"compare\.reference"):
        left("params.compare.yaml", tmp_path)
    with pytest.raises(ValueError, match=r"elsewhere, which is no folder; give the one"):
        left("params.compare.yaml", tmp_path / "elsewhere")
