"""A small comparison, done for real: shared teachers, resumed work, figures that add up."""

import contextlib
import csv
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import t, ttest_rel

from kd import artifacts, manifest, stages
from kd.compare import locks, report, work
from kd.compare.__main__ import main
from kd.compare.plan import Comparison, read_with_base
from kd.component import ConfigError, Refused
from kd.data import Images
from kd.evaluate import predict
from kd.methods import KD
from kd.tables import DiskTables
from kd.train import NonFiniteLoss
from kd.weightings.objectives import mixed_log_probs, sample_scores
from tests.data.toys import make_pictures

PROJECT = Path(__file__).parents[1]
TINY = {"kind": "plain_cnn", "depth": 2, "width": 0.5}
RAW = {
    "compare": {"name": "tiny", "base": "params.yaml", "seeds": 2, "reference": "kd"},
    "tracking": False,
    "recipe": {"epochs": 1, "batch_size": 256},
    "teacher": {"model": {"depth": 4, "width": 0.25}},
    "assistants": {name: {"model": {"depth": 2}} for name in ("large", "medium", "small")},
    "weights": {"kind": "uniform"},
    "student": {"model": {"width": 0.25}},
    "cells": {
        "labels": {"teachers": "none"},
        "kd": {"teachers": "teacher"},
        "again": {"teachers": "teacher"},
        "born_again": {"teachers": "none", "generations": 2},
        "teacher": {"teachers": "none"},  # called as rows above are
        "ensemble": {"teachers": "none"},
    },
}


def written(folder, **changes):
    (folder / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    path = folder / "params.compare.yaml"
    path.write_text(yaml.safe_dump(RAW | changes, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(PROJECT))
        written(folder)
        # Of two processes, one has to wait for what the other does.
        assert main(["params.compare.yaml", "--processes", "2"]) == 0
    return folder


@pytest.fixture
def here(finished, monkeypatch):
    monkeypatch.chdir(finished)
    return Comparison(Path("params.compare.yaml"))


def test_a_comparison_may_be_laid_over_another(tmp_path):
    written(tmp_path)
    about = {"name": "longer", "base": "params.compare.yaml"}
    cells = {"kd": {"method": {"kind": "kd", "alpha": 0.5}}, "dkd": {"teachers": "teacher"}}
    raw = {"compare": about, "recipe": {"epochs": 2}, "cells": cells}
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump(raw))
    below = Comparison(tmp_path / "params.compare.yaml")
    longer = Comparison(tmp_path / "longer.yaml")
    assert (longer.about.name, longer.about.seeds, longer.about.reference) == ("longer", 2, "kd")
    assert longer.cells == (*below.cells, "dkd")
    assert longer.params[1].student.recipe == replace(below.params[1].student.recipe, epochs=2)
    assert longer.params[1].baselines["kd"].teachers == "teacher"
    assert longer.params[1].baselines["kd"].method == KD(alpha=0.5)
    assert longer.params[1].baselines["again"] == below.params[1].baselines["again"]


@pytest.mark.parametrize("base", ["loop.yaml", "round.yaml"])
def test_a_comparison_that_is_its_own_base_is_refused(tmp_path, base):
    for name, below in (("loop", base), ("round", "./loop.yaml")):
        about = {"compare": {"name": name, "reference": "kd", "base": below}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(about))
    with pytest.raises(ConfigError, match=r"compare\.base is '.*loop\.yaml', which has this file"):
        Comparison(tmp_path / "loop.yaml")


def test_an_assistant_comes_after_those_that_teach_it_whatever_their_names(tmp_path):
    above = {"large": "assistants/medium", "medium": "assistants/small", "small": "teacher"}
    taught = {name: {"model": {"depth": 2}, "taught_by": each} for name, each in above.items()}
    units = Comparison(written(tmp_path, assistants=taught)).units
    done = set()
    for unit in units.values():
        assert done.issuperset(unit.needs)
        done.add(unit.id)
    assert "seed-0/assistants/medium" in units["seed-0/assistants/large"].needs


def of_cell(comparison, seed, name):
    return comparison.workspace(seed) / "artifacts/baselines" / name


def test_the_cells_of_a_seed_share_their_teacher_and_differ_between_seeds(here):
    teachers = [manifest.read(here.workspace(seed) / "artifacts/teacher") for seed in (0, 1)]
    assert teachers[0].sha256 != teachers[1].sha256
    for seed, teacher in enumerate(teachers):
        described = manifest.read(of_cell(here, seed, "kd"))
        assert described.teachers[0].sha256 == teacher.sha256


def test_cells_that_say_the_same_get_the_same_bits(here):
    for seed in (0, 1):
        one, two = (manifest.read(of_cell(here, seed, name)) for name in ("kd", "again"))
        assert one.sha256 == two.sha256


def test_what_is_done_is_not_done_again(here):
    assert all(here.is_done(unit) for unit in here.units.values())
    said = []
    work.do_all(here, 1, said.append)
    assert said == ["tiny: 0 of 24 units to do"]


def test_work_that_was_lost_is_done_again_to_the_same_bits(here):
    unit = here.units["seed-1/baselines/kd"]
    before = manifest.read(of_cell(here, 1, "kd")).sha256
    here.record(unit).unlink()
    work.do(here, unit)
    assert here.is_done(unit)
    assert manifest.read(of_cell(here, 1, "kd")).sha256 == before
    done = here.record(unit).stat().st_mtime_ns
    work.do(here, unit)
    assert here.record(unit).stat().st_mtime_ns == done


def test_a_changed_cell_concerns_itself_alone_and_a_changed_teacher_all_below(here, tmp_path):
    def stale(**changes):
        comparison = Comparison(written(tmp_path, **changes))
        assert comparison.folder == here.folder
        return {id for id, unit in comparison.units.items() if not comparison.is_done(unit)}

    cells = RAW["cells"] | {"kd": {"teachers": "teacher", "method": {"kind": "dkd"}}}
    assert stale(cells=cells) == {"seed-0/baselines/kd", "seed-1/baselines/kd"}
    taught = stale(teacher={"model": {"depth": 4, "width": 0.5}})
    assert taught == {id for id in here.units if not id.endswith("/data")}
    assert stale() == set()


def test_the_users_own_code_is_found_before_any_work_and_an_edit_concerns_who_uses_it(
    tmp_path, monkeypatch
):
    """All of `code` counts for a cell that uses a part of it: the part may import the rest."""
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(own))
    (own / "kd_tests_compared.py").write_text("from kd.methods import KD\n")

    def digests(name):
        method = {"kind": "custom", "path": f"kd_tests_compared:{name}"}
        cells = RAW["cells"] | {"mine": {"teachers": "teacher", "method": method}}
        file = written(tmp_path, code="own", cells=cells)
        return {id: unit.digest for id, unit in Comparison(file).units.items()}

    with pytest.raises(ConfigError, match=r"yaml: cells\.mine\.method: .* has no 'KDD'"):
        digests("KDD")
    before = digests("KD")
    (own / "helper.py").write_text("")
    after = digests("KD")
    changed = {id for id in before if before[id] != after[id]}
    assert changed == {"seed-0/baselines/mine", "seed-1/baselines/mine"}
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ConfigError, match=r"no params\.yaml is in .* the project's root"):
        digests("KD")


def test_every_cell_has_the_same_budget_but_for_its_generations(here):
    seen = {
        name: artifacts.read_json(of_cell(here, 0, name) / "metrics.json")["samples_seen"]
        for name in here.cells
    }
    assert seen["labels"] == seen["kd"] == seen["again"] == seen["born_again"] / 2
    said = (here.folder / "report.md").read_text().splitlines()[0]
    assert said == (
        "2 seeds, 1 epochs for every cell (2 times that for born_again); mean ± deviation."
    )


def test_the_report_is_made_of_the_records(here):
    record = json.loads((here.folder / "report.json").read_text())
    accuracies = {name: row["test_accuracy"] for name, row in record["rows"].items()}
    labels, kd = accuracies["baselines/labels"], accuracies["baselines/kd"]
    assert kd == accuracies["baselines/again"]
    gaps = [100 * (a - b) for a, b in zip(labels, kd, strict=True)]
    mean, half = statistics.mean(gaps), float(t.ppf(0.975, 1)) * statistics.stdev(gaps) / 2**0.5
    table = (here.folder / "report.md").read_text()
    assert f"| {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] |" in table
    assert record["rows"]["baselines/kd"]["test_agreement"] != [1.0, 1.0], "with the teacher"
    units = [here.units[f"seed-{seed}/baselines/again"] for seed in (0, 1)]  # as no test did anew
    seconds = [artifacts.read_json(here.record(unit))["cpu_seconds"] for unit in units]
    assert record["rows"]["baselines/again"]["cpu_seconds"] == seconds
    assert f"| labels | {report.spread(labels, 'test_accuracy')}" in table
    assert {"teacher", "ensemble", "assistants/large"} <= record["rows"].keys()
    with (here.folder / "results.csv").open(newline="") as file:
        rows = {(row["cell"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == here.about.seeds * len(record["rows"])
    found = [float(rows["baselines/labels", seed]["test_accuracy"]) for seed in "01"]
    assert found == pytest.approx(labels)


def test_a_cell_may_be_called_as_a_row_above_is(here):
    rows = json.loads((here.folder / "report.json").read_text())["rows"]
    assert rows["teacher"]["test_agreement"] == [1.0, 1.0]
    assert rows["baselines/teacher"] != rows["teacher"]
    table = (here.folder / "report.md").read_text().splitlines()
    compared = [line.split("|")[1].strip() for line in table if line.endswith(" of 2 |")]
    expected = ["again", "baselines/ensemble", "baselines/teacher", "born_again", "labels"]
    assert sorted(compared) == expected
    for above in ("teacher", "ensemble"):
        assert sum(line.startswith(f"| {above} |") for line in table) == 1


def test_the_ensemble_is_mixed_as_its_weights_were_found_for(here):
    """Another way than kd.examine's, in float64."""
    path = here.workspace(0) / "artifacts/weights/weights.json"
    whole, record = path.read_text(), artifacts.read_json(path)
    record["weighting"]["mixing"] = "logits"
    record["sets"]["chosen"]["temperature"] = 0.125  # members hardly trained differ little at 1
    try:
        path.write_text(json.dumps(record))
        found = report.of_seed(here, 0, ())["ensemble"]
    finally:
        path.write_text(whole)
    with contextlib.chdir(here.workspace(0)):
        test = Images.load(artifacts.ROOT / "data", "test")
        folders = [artifacts.folder(f"assistants/{name}") for name in record["weights"]]
        members = [manifest.load(folder)[0] for folder in folders]
    logits_KNC = np.stack([predict(member, test).double().numpy() for member in members])
    weights_K = np.array(list(record["weights"].values()))
    mixed_NC = mixed_log_probs(weights_K, logits_KNC, "logits", temperature=0.125)
    nll_N, _ = sample_scores(mixed_NC, test.labels_N.numpy())
    assert found["test_nll"] == pytest.approx(nll_N.mean(), rel=1e-5)


def test_it_ends_by_saying_where_the_table_and_the_networks_lie(here, capsys):
    Path("page.md").write_text("<!-- tiny -->\n<!-- /tiny -->")
    asked = ["--record", "recorded", "--into", "page.md"]
    assert main(["params.compare.yaml", "--processes", "1", *asked]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{here.folder}: report.md has this table")
    table = (here.folder / "report.md").read_text()
    assert Path("recorded/report.md").read_text() == table
    assert Path("page.md").read_text() == f"<!-- tiny -->\n{table}<!-- /tiny -->"


def test_a_cell_that_diverges_is_a_result_and_stops_nobody_else(here, monkeypatch):
    unit = here.units["seed-1/baselines/labels"]
    path = here.record(unit)
    whole, table = path.read_text(), report.write(here, here.folder)
    taught = here.record(here.units["seed-1/teacher"]).read_text()

    def diverge(params, name, run):
        raise NonFiniteLoss("at step 3")

    try:
        path.unlink()
        monkeypatch.setitem(stages.STAGES, "baselines", diverge)
        work.do(here, unit)
        without = report.write(here, here.folder)
        assert "Diverged, so without a row: labels in 1 seeds." in without
        assert "| labels |" in table
        assert "| labels |" not in without
        against = Comparison(Path("params.compare.yaml"))
        against.about = replace(against.about, reference="labels")
        with pytest.raises(Refused, match="the reference labels diverged"):
            report.build(against)
        teacher = here.units["seed-1/teacher"]
        monkeypatch.setitem(stages.STAGES, "teacher", diverge)
        with pytest.raises(NonFiniteLoss):  # all others need it
            work.carry_out(here, teacher)
        assert not here.is_done(teacher)
    finally:
        path.write_text(whole)
        here.record(here.units["seed-1/teacher"]).write_text(taught)
        report.write(here, here.folder)


def test_a_unit_that_was_begun_before_says_that_its_seconds_are_not_all(here, monkeypatch):
    unit = here.units["seed-1/baselines/labels"]
    path = here.record(unit)
    whole = path.read_text()
    assert json.loads(whole)["resumed"] is False

    def stop(params, name, run):
        raise RuntimeError("the power is out")

    said = "Started more than once, so CPU seconds are those of the last attempt only: labels"
    try:
        path.unlink()
        with monkeypatch.context() as patch:
            patch.setitem(stages.STAGES, "baselines", stop)
            with pytest.raises(RuntimeError, match="the power is out"):
                work.do(here, unit)
        assert not here.is_done(unit)
        work.do(here, unit)
        assert f"{said} in 1 seeds." in report.write(here, here.folder)
        path.write_text(json.dumps({"begun": "by other settings"}))
        work.do(here, unit)
        assert json.loads(path.read_text())["resumed"] is False
    finally:
        path.write_text(whole)
        assert said not in report.write(here, here.folder)


def test_a_tracked_unit_is_found_by_its_comparison_seed_and_cell(here, tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("KD_RECORDER_IDLE", "0.5")
    here.params = [replace(each, tracking=True) for each in here.params]
    for name in ("data", "baselines/labels"):
        here.record(here.units[f"seed-1/{name}"]).unlink()
        work.do(here, here.units[f"seed-1/{name}"])
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        runs = "SELECT name, key, value FROM runs JOIN tags USING (run_uuid)"
        tags = {(name, key): value for name, key, value in store.execute(runs)}
    for name, cell in {"data": "", "baselines/labels": "labels"}.items():
        assert tags[name, "kd.comparison"] == "tiny"
        assert tags[name, "kd.seed"] == "1"
        assert tags[name, "kd.cell"] == cell


def test_making_tables_counts_for_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fill(table):
        begun = time.process_time()
        while time.process_time() < begun + 0.5:
            pass
        table.zero_()

    before = work.cpu_seconds()
    DiskTables().table({"member": 1}, (1, 1, 1), fill)
    assert work.cpu_seconds() - before < 0.3


def test_a_difference_s_chance_is_that_of_the_paired_test():
    ours, theirs = [0.91, 0.94, 0.92, 0.95], [0.90, 0.90, 0.91, 0.92]
    gain = report.paired(ours, theirs)
    assert report.chance(*gain, 3) == pytest.approx(ttest_rel(ours, theirs).pvalue)
    assert report.chance(0.0, 0.0, 3) == 1
    assert report.chance(0.5, 0.0, 3) == 0


def test_the_table_says_of_each_row_what_its_seeds_show():
    figures = {
        "test_worst_class_accuracy": [0.5, 0.6, 0.7],
        "test_nll": [1.0, 2.0, 3.0],
        "test_ece": [0.01, 0.01, 0.01],
        "test_agreement": [0.9, 0.8, 0.7],
        "cpu_seconds": [100.0, 101.0, 102.0],
    }
    accuracies = {
        "teacher": [0.8, 0.9, 0.7],
        "baselines/worse": [0.60, 0.68, 0.80],
        "baselines/base": [0.70, 0.72, 0.80],
        "baselines/better": [0.75, 0.76, 0.83],
    }
    record = {
        "seeds": 3,
        "reference": "base",
        "epochs": 4,
        "samples_seen": dict.fromkeys(accuracies, 100) | {"baselines/worse": 150},
        "rows": {name: figures | {"test_accuracy": each} for name, each in accuracies.items()},
        "failed": {"baselines/lost": 2},
        "resumed": {},
    }
    said = report.markdown(record)
    lines = said.splitlines()
    assert lines[0] == (
        "3 seeds, 4 epochs for every cell (1.5 times that for worse); mean ± deviation."
    )
    assert lines[2].startswith("| | test accuracy, % | worst class, % | NLL | ECE, % | agreement ")
    others = "60.00 ± 10.00 | 2.000 ± 1.000 | 1.00 ± 0.00 | 80.00 ± 10.00 | 101.0 ± 1.0"
    base = accuracies["baselines/base"]
    p = {
        name: ttest_rel(accuracies[f"baselines/{name}"], base).pvalue
        for name in ("worse", "better")
    }
    assert p["better"] < p["worse"]
    gaps = {"better": [5, 4, 3], "worse": [-10, -4, 0]}
    ends = {
        name: [statistics.mean(each) + sign * half(each) for sign in (-1, 1)]
        for name, each in gaps.items()
    }
    assert lines[4:8] == [
        f"| teacher | 80.00 ± 10.00 | {others} |  |  |  |",
        f"| better | 78.00 ± 4.36 | {others} | "
        f"+4.00 [{ends['better'][0]:+.2f}, {ends['better'][1]:+.2f}] | "
        f"{2 * p['better']:.3f} | 3 of 3 |",
        f"| base | 74.00 ± 5.29 | {others} |  |  |  |",
        f"| worse | 69.33 ± 10.07 | {others} | "
        f"-4.67 [{ends['worse'][0]:+.2f}, {ends['worse'][1]:+.2f}] | "
        f"{p['worse']:.3f} | 0 of 3 |",
    ]
    assert lines[-1] == f"{report.NOTED['failed']}: lost in 2 seeds."
    assert report.NOTED["resumed"] not in said


def half(gaps):
    """Half the width of Student's interval of 95 %."""
    return float(t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / len(gaps) ** 0.5


def test_a_table_goes_into_a_page_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- tiny -->\nold\n<!-- /tiny -->\nb\n")
    report.into(page, "tiny", "new\n")
    assert page.read_text() == "a\n<!-- tiny -->\nnew\n<!-- /tiny -->\nb\n"
    for marks in ("", "<!-- other -->\n", "<!-- /other -->\n"):
        page.write_text(f"a\n{marks}b\n")
        with pytest.raises(ConfigError, match="has no <!-- other -->"):
            report.into(page, "other", "new\n")
        assert page.read_text() == f"a\n{marks}b\n"


def test_units_are_listed_for_who_orders_them(here, capsys):
    here.record(here.units["seed-0/baselines/labels"]).rename("kept.json")
    try:
        assert main(["params.compare.yaml", "--list"]) == 0
    finally:
        Path("kept.json").rename(here.record(here.units["seed-0/baselines/labels"]))
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == ["seed-0/baselines/labels"]
    assert "seed-0/weights" in listed["seed-0/baselines/labels"]


def test_a_folder_of_pictures_is_named_from_where_the_comparison_is_started(tmp_path, monkeypatch):
    make_pictures(tmp_path / "mine", {"cat": 18, "dog": 18})
    splits = {"val": 0.2, "test": 0.2, "labels_per_class": 2}
    dataset = {"kind": "image_folder", "root": "mine"}
    written(tmp_path, data={"source": "mine", "dataset": dataset, "splits": splits})
    monkeypatch.chdir(tmp_path)
    assert main(["params.compare.yaml", "--unit", "seed-0/data"]) == 0
    (record,) = tmp_path.rglob("data.json")
    assert json.loads(record.read_text())["class_names"] == ["cat", "dog"]


def test_edited_code_and_pictures_of_the_users_own_make_their_units_stale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code = tmp_path / "kd_tests_compared_code.py"
    code.write_text("from kd.methods import KD\n\n\nclass Mine(KD):\n    pass\n")
    make_pictures(tmp_path / "mine", {"cat": 2})
    make_pictures(tmp_path / "elsewhere", {"dog": 2})
    (tmp_path / "mine/dog").symlink_to(tmp_path / "elsewhere/dog")
    method = {"kind": "custom", "path": "kd_tests_compared_code:Mine"}
    dataset = {"kind": "image_folder", "root": "mine"}
    path = written(
        tmp_path,
        code=code.name,
        data={"source": "mine", "dataset": dataset},
        cells=RAW["cells"] | {"mine": {"teachers": "teacher", "method": method}},
    )

    def digests():
        return {id: unit.digest for id, unit in Comparison(path).units.items()}

    before = digests()
    assert digests() == before
    code.write_text(code.read_text() + "# edited\n")
    edited = digests()
    stale = {id for id in before if before[id] != edited[id]}
    assert stale == {"seed-0/baselines/mine", "seed-1/baselines/mine"}
    for folder in ("mine/cat", "mine/dog"):
        before = digests()
        (tmp_path / "mine/code.pyc").touch()  # which Python writes by itself
        assert digests() == before
        next((tmp_path / folder).iterdir()).touch()
        assert set(before.values()).isdisjoint(digests().values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compare": RAW["compare"] | {"reference": "dkd"}}, "compare.reference is 'dkd'"),
        ({"compare": RAW["compare"] | {"name": "../up"}}, r"name is '\.\./up'; it must be a name"),
        ({"compare": RAW["compare"] | {"seeds": 1}}, "compare.seeds is 1; it must be at least 2"),
        ({"cells": {"kd": {"teachers": "teacher", "method": {"kind": "kdd"}}}}, "did you mean"),
        ({"cells": {"kd": {"teachers": "nobody"}}}, r"yaml: cells\.kd\.teachers is 'nobody'"),
        ({"cells": None}, "yaml: cells is None; it must be a mapping of names"),
        ({"cells": {1: {"teachers": "none"}}}, "compare.reference is '.*'; it must be one of"),
        ({"studen": {}}, "studen is not a known key"),
    ],
)
def test_a_wrong_comparison_is_refused_before_any_work(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        Comparison(written(tmp_path, **changes))


@pytest.mark.parametrize("seeds", ["0", "1"])
def test_too_few_seeds_are_refused_before_any_work(tmp_path, monkeypatch, capsys, seeds):
    monkeypatch.chdir(written(tmp_path).parent)
    assert main(["params.compare.yaml", "--seeds", seeds]) == 1
    assert f"seeds is {seeds}; it must be at least 2" in capsys.readouterr().err
    assert not (tmp_path / ".kd").exists()


def test_an_error_is_told_with_the_unit_that_it_arose_in(tmp_path, monkeypatch, capsys):
    splits = {"val": 0.2, "test": 0.2, "labels_per_class": 1000}
    monkeypatch.chdir(written(tmp_path, data={"splits": splits}).parent)
    assert main(["params.compare.yaml", "--unit", "seed-0/data"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: ")
    assert said[-1] == "in seed-0/data"


def test_a_unit_that_fails_keeps_no_other_from_being_done(here, monkeypatch, capsys):
    """A method of one's own raises what cannot be sent from process to process."""
    monkeypatch.syspath_prepend(str(Path.cwd()))
    own = Path("kd_tests_failing.py").resolve()
    own.write_text(
        "from kd.methods import KD\n\n\n"
        "class Odd(Exception):\n"
        "    def __init__(self, one, two):\n"
        "        super().__init__(f'{one}\\n{two}')\n\n\n"
        "class Mine(KD):\n"
        "    def loss(self, shown):\n"
        "        raise Odd('no', 'more')\n"
    )
    method = {"kind": "custom", "path": "kd_tests_failing:Mine"}
    more = {"mine": {"teachers": "teacher", "method": method}, "last": {"teachers": "none"}}
    raw = RAW | {"code": own.name, "cells": RAW["cells"] | more}
    Path("failing.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    before = (here.folder / "report.md").read_text()
    assert main(["failing.yaml", "--processes", "1"]) == 1
    told = capsys.readouterr()
    comparison = Comparison(Path("failing.yaml"))
    failed = [f"seed-{seed}/baselines/mine" for seed in (0, 1)]
    assert [id for id, u in comparison.units.items() if not comparison.is_done(u)] == failed
    why = f"Odd in {own}, line 11: no"
    first, *others = told.err.splitlines()
    assert first.startswith("error: 2 of 28 units failed, so there is no table")
    assert others == [f"{id}: {why}" for id in failed]
    assert f"{failed[0]} failed: {why}" in told.out
    assert "Odd: no\nmore\nin seed-0/" in (here.workspace(0) / "log.txt").read_text()
    assert (here.folder / "report.md").read_text() == before


def test_a_process_that_the_system_kills_is_told_of_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = tmp_path / "kd_tests_killed.py"
    own.write_text(
        "import os, signal\n\nfrom kd.methods import KD\n\n\n"
        "class Mine(KD):\n"
        "    def loss(self, shown):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    method = {"kind": "custom", "path": "kd_tests_killed:Mine"}
    written(tmp_path, code=own.name, cells={"kd": {"teachers": "teacher", "method": method}})
    assert main(["params.compare.yaml", "--processes", "1"]) == 1
    assert capsys.readouterr().err == (
        "error: a process was killed while these ran: seed-0/data; if memory ran out, "
        "give fewer --processes (now 1); the next run resumes\n"
    )


def test_what_needs_a_failed_unit_needs_it_by_others_too(here):
    failed = set(work.needing(here.units, "seed-0/teacher"))
    assert failed == {id for id in here.units if id[:6] == "seed-0"} - {"seed-0/data"}


def test_what_needs_a_failed_unit_is_left_undone(tmp_path, monkeypatch, capsys):
    """The first seed's data cannot be split so, and the second's are another process's to make."""
    splits = {"val": 0.2, "test": 0.2, "labels_per_class": 1000}
    monkeypatch.chdir(written(tmp_path, data={"splits": splits}).parent)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    comparison = Comparison(Path("params.compare.yaml"))
    busy = comparison.record(comparison.units["seed-1/data"]).with_suffix(".lock")
    with locks.held(busy, "tests"):
        assert main(["params.compare.yaml", "--processes", "1"]) == 1
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("error: 2 of 24 units failed")
    assert [line.partition(": ")[0] for line in others] == ["seed-0/data", "seed-1/data"]
    assert others[1].startswith(f"seed-1/data: a comparison (process {os.getpid()}, since ")
    assert others[1].endswith(") does seed-1/data: wait for it, or stop it")


def test_a_second_run_is_refused_and_told_who_works_there(here, capsys):
    unit, another = (here.units[f"seed-{seed}/baselines/kd"] for seed in (0, 1))
    path = here.record(unit)
    kept = path.read_text()

    def told(*arguments):
        status = main(["params.compare.yaml", *arguments])
        return status, *capsys.readouterr()

    path.unlink()
    try:
        with (
            locks.held(here.folder / "run.lock", "works"),
            locks.held(path.with_suffix(".lock"), "works"),
        ):
            refused = told(), told("--unit", unit.id)
            listed = told("--list")
            here.record(another).unlink()
            assert told("--unit", another.id) == (0, "", "")
    finally:
        path.write_text(kept)
    for (status, out, line), does in zip(
        refused, (f"works in {here.folder}", f"does {unit.id}"), strict=True
    ):
        assert (status, out) == (1, "")
        assert line.startswith(f"error: a comparison (process {os.getpid()}, since ")
        assert line.endswith(f") {does}: wait for it, or stop it\n")
    assert json.loads(listed[1]).keys() == {unit.id}
    assert here.is_done(another)


def test_a_lock_vanishes_with_a_process_that_is_killed(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import pathlib, sys, time; from kd.compare import locks\n"
        "with locks.held(pathlib.Path(sys.argv[1]), 'waits'): print(flush=True); time.sleep(99)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], env=environment, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        with (
            pytest.raises(Refused, match=rf"process {holder.pid}, since .* waits: wait for it"),
            locks.held(path, "waits"),
        ):
            pass
        holder.kill()
        holder.wait()
        with locks.held(path, "waits"):
            assert f"process {os.getpid()}," in path.read_text()


@pytest.mark.parametrize(
    "path", sorted(PROJECT.glob("params.compare*.yaml")), ids=lambda p: p.name
)
def test_the_projects_comparisons_are_valid(path):
    comparison = Comparison(path)
    assert comparison.about.seeds >= 2
    assert len(comparison.cells) > 3


def test_a_comparison_needs_neither_dvc_nor_prefect_nor_mlflow_nor_optuna(tmp_path):
    script = """
import sys
class Gate:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "dvc prefect mlflow optuna sklearn scipy rich".split():
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Gate())
import kd.compare.__main__, kd.weightings
"""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)


@pytest.mark.slow
def test_the_reduced_comparison_works_on_the_real_images_of_cifar10(tmp_path, monkeypatch):
    """Its own file, but for the budget: 2 seeds, 1 epoch of 500 images, three cells."""
    root = Path(os.environ.get("KD_DATA_ROOT", "absent")) / "cifar10"
    if not (root / "cifar-10-batches-py").exists():
        pytest.skip("KD_DATA_ROOT names no folder with cifar10/cifar-10-batches-py")
    raw = read_with_base(PROJECT / "params.compare.cifar10-small.yaml")
    del raw["compare"]["base"]
    raw["compare"]["seeds"] = 2
    raw["recipe"] |= {"epochs": 1, "precision": "fp32", "validate_every": 1}
    raw["data"] |= {"dataset": {"kind": "cifar10", "root": str(root)}, "image_size": 16}
    raw["data"]["splits"]["val"] = 49_500
    for role in (raw["teacher"], raw["student"], *raw["assistants"].values()):
        role["model"]["width"] = 0.125
    raw["cells"] = {name: raw["cells"][name] for name in ("labels", "kd", "em")}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    assert main(["compare.yaml", "--processes", "2", "--record", "record"]) == 0
    seen = json.loads((tmp_path / "record" / "report.json").read_text())["samples_seen"]
    assert seen["baselines/labels"] == seen["baselines/kd"] == seen["baselines/em"] >= 500
    rows = (tmp_path / "record" / "results.csv").read_text().splitlines()
    assert sum(row.startswith("baselines/kd,") for row in rows) == 2
