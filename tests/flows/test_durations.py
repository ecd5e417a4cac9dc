import json
import math
from pathlib import Path

from flows.durations import expected
from flows.graph import Stage


def test_a_stage_takes_as_long_as_it_did_or_as_its_like_or_is_guessed(tmp_path: Path) -> None:
    runs = tmp_path / "artifacts" / "runs" / "assistants"
    runs.mkdir(parents=True)
    for name, seconds in (("large", 30.5), ("small", 9)):
        (runs / f"{name}.json").write_text(json.dumps({"seconds": seconds}))
    (runs.parent / "teacher.json").write_text("{}")  # of an older version
    names = ("assistants@large", "assistants@small", "assistants@new", "data")
    stages = [Stage(name, ()) for name in names] + [Stage("teacher", (), gpu=1.0)]
    assert expected(tmp_path, stages) == {
        "assistants@large": 30.5,
        "assistants@small": 9,
        "assistants@new": 30.5,
        "data": 0,
        "teacher": math.inf,
    }
