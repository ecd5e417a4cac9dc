import json

import pytest
from dvc.exceptions import NotDvcRepoError

from flows import graph
from tests.flows.toys import FOREIGN_WARNINGS, Toy

pytestmark = FOREIGN_WARNINGS

FAMILY = {
    "prep": {"cmd": "cat source > prep.txt", "deps": ["source"], "outs": ["prep.txt"]},
    "each": {
        "foreach": ["small", "large"],
        "do": {
            "cmd": "mkdir -p out && cp prep.txt out/${item}",
            "deps": ["prep.txt"],
            "params": ["model"],
            "outs": ["out/${item}"],
            "meta": {"threads": 2, "gpu": True, "timeout": 60, "retries": 1},
        },
    },
    "last": {"cmd": "cat out/* > last.txt", "deps": ["out"], "outs": ["last.txt"]},
}


@pytest.fixture
def done(toy: Toy) -> Toy:
    toy.write(FAMILY, model={"depth": 4, "method": {"temperature": 4.0}})
    toy.path("source").write_text("one")
    toy.dvc("repro")
    return toy


def test_stages_come_dependencies_first_with_what_their_meta_says(toy: Toy) -> None:
    toy.write(FAMILY, model={})
    plan = graph.read(toy.root)
    assert [each.name for each in plan.stages] == ["prep", "each@small", "each@large", "last"]
    assert plan.stages[0] == graph.Stage("prep", waits_for=())
    assert plan.stages[1] == graph.Stage(
        "each@small", waits_for=("prep",), threads=2, gpu=True, timeout=60.0, retries=1
    )
    assert plan.stages[3].waits_for == ("each@large", "each@small")
    assert plan.reasons == dict.fromkeys([each.name for each in plan.stages], "never run")


def test_nothing_is_stale_after_dvc_repro(done: Toy) -> None:
    assert graph.read(done.root).reasons == {}


def test_a_changed_param_is_named_with_both_values(done: Toy) -> None:
    done.write(FAMILY, model={"depth": 4, "method": {"temperature": 2.0}})
    reason = "params model.method.temperature 4.0 -> 2.0"
    assert graph.read(done.root).reasons == {
        "each@small": reason,
        "each@large": reason,
        "last": "after each@large and each@small",
    }


def test_a_changed_param_is_named_before_files_that_a_failed_stage_took_away(done: Toy) -> None:
    done.write(FAMILY, model={"depth": 6, "method": {"temperature": 4.0}})
    done.path("prep.txt").unlink()
    done.path("out/small").unlink()
    reason = graph.read(done.root).reasons["each@small"]
    assert reason == "params model.depth 4 -> 6 and 2 more"


def test_changed_inputs_outputs_and_commands_are_named(done: Toy) -> None:
    done.path("source").write_text("two")
    done.path("last.txt").unlink()
    stages = json.loads(json.dumps(FAMILY))
    stages["each"]["do"]["cmd"] += " && true"
    stages["last"]["params"] = ["model.depth"]
    done.write(stages, model={"depth": 4, "method": {"temperature": 4.0}})
    assert graph.read(done.root).reasons == {
        "prep": "input source changed",
        "each@small": "command changed",
        "each@large": "command changed",
        "last": "params model.depth absent -> 4 and output last.txt missing",
    }


def test_a_disowned_stage_is_stale_and_is_not_restored_from_the_run_cache(done: Toy) -> None:
    done.path("source").write_text("two")
    done.dvc("repro")
    graph.disown(done.root, "prep")
    assert set(graph.read(done.root).reasons) == {"prep", "each@small", "each@large", "last"}
    said = done.dvc("repro", "prep")
    assert "> cat source" in said
    assert "cached" not in said
    assert done.status() == {}


def test_unknown_meta_is_refused_by_name(toy: Toy) -> None:
    toy.write({"one": {"cmd": "true", "meta": {"theads": 2}}})
    with pytest.raises(ValueError, match=r"meta of one has theads; it may have threads, gpu"):
        graph.read(toy.root)


def test_a_stage_takes_a_share_of_a_gpu_or_several_whole_ones(toy: Toy) -> None:
    for said in (0.5, 2):
        toy.write({"one": {"cmd": "true", "meta": {"gpu": said}}})
        assert graph.read(toy.root).stages[0].gpu == said
    for said in (1.5, -1, "many"):
        toy.write({"one": {"cmd": "true", "meta": {"gpu": said}}})
        with pytest.raises(ValueError, match=rf"meta of one: gpu is '?{said}'?; it may be true,"):
            graph.read(toy.root)


def test_what_a_stage_reads_of_what_dvc_tracks_and_who_made_it(done: Toy) -> None:
    paths, lock = graph.tracked_inputs(done.root, ["last"])
    assert (paths, set(lock)) == (("out/large", "out/small"), {"each@small", "each@large"})
    paths, lock = graph.tracked_inputs(done.root, ["last", "each@small", "each@large"])
    assert (paths, set(lock)) == (("prep.txt",), {"prep"})
    assert lock["prep"]["outs"][0]["md5"]


def test_meta_of_the_wrong_type_is_refused(toy: Toy) -> None:
    toy.write({"one": {"cmd": "true", "meta": {"threads": "many"}}})
    with pytest.raises(ValueError, match=r"meta of one: .*many"):
        graph.read(toy.root)


def test_a_folder_without_dvc_is_refused(toy: Toy) -> None:
    (toy.root / ".dvc" / "config").unlink()
    (toy.root / ".dvc" / ".gitignore").unlink()
    toy.root.joinpath(".dvc").rename(toy.root / "dvc")
    with pytest.raises(NotDvcRepoError):
        graph.read(toy.root)
