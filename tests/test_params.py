import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from kd import SETTINGS, STAGES, build, params
from kd.component import ConfigError
from kd.methods import KD
from kd.models import PlainCNN
from kd.recipe import SGD, AdamW, Cosine, Recipe, Steps
from kd.weightings import Uniform

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def raw():
    """The project's own experiment as plain data, to be broken one key at a time."""
    return yaml.safe_load((PROJECT / "params.yaml").read_text())


def test_the_projects_own_experiment_is_valid():
    read = params.load(PROJECT / "params.yaml")
    assert read.teacher.model.kind == "plain_cnn"
    assert set(read.exports) == {"executorch", "executorch_int8", "onnx", "onnx_int8"}


def test_components_become_objects_with_their_defaults(raw):
    raw["student"]["method"] = {"kind": "kd", "temperature": 2}
    read = params.parse(raw)
    assert read.student.method == KD(temperature=2.0)
    assert isinstance(read.student.model, PlainCNN)
    assert read.baselines["uniform"].weighting == Uniform()
    assert read.baselines["labels"].weighting is None


def test_a_roles_recipe_overrides_single_keys_of_the_default_one(raw):
    raw["recipe"] = {"epochs": 7, "optimizer": {"kind": "sgd", "lr": 0.5, "momentum": 0.8}}
    raw["teacher"]["recipe"] = {"epochs": 9, "optimizer": {"lr": 0.1}}
    raw["student"]["recipe"] = {"optimizer": {"kind": "adamw"}}
    read = params.parse(raw)
    assert read.teacher.recipe.epochs == 9
    assert read.teacher.recipe.optimizer == SGD(lr=0.1, momentum=0.8)
    assert read.student.recipe.epochs == 7
    assert read.student.recipe.optimizer == AdamW()
    assert read.assistants["small"].recipe.optimizer == SGD(lr=0.5, momentum=0.8)


def set_at(raw, path, value):
    *parents, last = path.split(".")
    for key in parents:
        raw = raw[key]
    raw[last] = value


OWN = {"kind": "custom", "path": "kd_tests_mine.nets:tiny"}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's folder, with a model of his own."""
    (tmp_path / "params.yaml").touch()
    (tmp_path / "kd_tests_mine").mkdir()
    (tmp_path / "kd_tests_mine/nets.py").write_text("def tiny(num_classes, hidden=8): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("kd_tests_mine", "kd_tests_mine.nets"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("code", ["kd_tests_mine/nets.py", "kd_tests_mine"])
def test_own_code_that_dvc_watches_is_found(mine, raw, code):
    raw["student"]["model"] = {**OWN, "args": {"hidden": 16}}
    raw["code"] = code
    params.check_own(params.parse(raw), "report")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"code": "kd/data", "student.model": OWN},
            "^code is 'kd/data'; it must be kd_tests_mine/nets.py, or a folder that holds it: "
            "student.model is there",
        ),
        (
            {"student.model": {**OWN, "path": "kd_tests_mine.nets:tinny"}},
            r"^student\.model: path 'kd_tests_mine.nets:tinny': .* has no 'tinny'",
        ),
        (
            {"assistants.small.model": {**OWN, "args": {"hiden": 16}}},
            r"^assistants\.small\.model: path .* cannot be called with {'hiden': 16}",
        ),
        (
            {"baselines.labels.method": {**OWN, "path": "kd.methods:KD", "args": {"alpha": 2}}},
            r"^baselines\.labels\.method: .*alpha is 2",
        ),
        (
            {"student.model": {"kind": "torchvision", "name": "mobilenet_v3_smal"}},
            r"^student\.model: name 'mobilenet_v3_smal' .*nearest: mobilenet_v3_small",
        ),
        (
            {"student.model": {"kind": "torchvision", "name": "resnet18", "args": {"progres": 1}}},
            r"^student\.model: args has 'progres', which resnet18 .*nearest: progress",
        ),
        (
            {"student.method": {"kind": "dml"}, "student.peers": {"one": {**OWN, "path": "no:x"}}},
            r"^student\.peers\.one: .*cannot import no ",
        ),
        (
            {"data.dataset": {**OWN, "path": "no:x"}, "data.source": "images"},
            r"^data\.dataset: .*cannot import no ",
        ),
    ],
)
def test_what_is_named_and_cannot_be_used_is_named_by_its_key(mine, raw, changes, said):
    for path, value in ({"code": "kd_tests_mine"} | changes).items():
        set_at(raw, path, value)
    with pytest.raises(ConfigError, match=said):
        params.check_own(params.parse(raw), "data")


def test_where_networks_are_trained_the_data_set_may_be_out_of_reach(mine, raw):
    raw["data"] |= {"dataset": {**OWN, "path": "no:x"}, "source": "images"}
    params.check_own(params.parse(raw), "teacher")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("sead", 1, "sead is not a known key; did you mean 'seed'?"),
        ("student.metod", {}, "student.metod is not a known key; did you mean 'method'?"),
        (
            "student.method.temprature",
            2,
            "student.method.temprature is not a known key; did you mean",
        ),
        ("student.method.temperature", "hot", "student.method.temperature is 'hot'"),
        ("student.method.temperature", 0, "student.method.temperature is 0"),
        ("student.method.alpha", 1.5, "student.method.alpha is 1.5; it must be in [0, 1]"),
        ("student.model.kind", "plain_cn", "student.model.kind is 'plain_cn'; did you mean"),
        ("student.model", {"depth": 2}, "student.model.kind is missing"),
        ("student.model.depth", 3, "student.model.depth"),
        ("teacher.model", "resnet", "teacher.model is 'resnet'; it must be a mapping"),
        ("recipe.epochs", 0, "recipe.epochs is 0; it must be at least 1"),
        ("recipe.epochs", 2.5, "recipe.epochs is 2.5"),
        ("recipe.optimizer.lr", "fast", "recipe.optimizer.lr is 'fast'"),
        ("recipe.optimizer.kind", "sdg", "recipe.optimizer.kind is 'sdg'; did you mean 'sgd'?"),
        ("recipe.schedule", {"kind": "steps", "milestones": [0.9, 0.5]}, "recipe.schedule.mile"),
        ("data.channels", 2, "data.channels is 2"),
        ("data.dataset.kind", "cifar", "data.dataset.kind is 'cifar'"),
        ("data.dataset", {"kind": "image_folder", "root": "mine"}, "data.source is 'kd/data'; it"),
        ("data.splits.val", 1.5, "data.splits.val is 1.5"),
        ("assistants", {}, "assistants is {}; it must be at least one"),
        ("assistants.Big One", {"model": {"kind": "plain_cnn", "depth": 4}}, "assistants.Big One"),
        *(
            (
                f"assistants.{name}",
                {
                    "model": {"kind": "plain_cnn", "depth": 4},
                    "method": {"kind": "kd"},
                    "taught_by": "teacher",
                },
                f"assistants.{name} is '{name}'; it must be another name",
            )
            for name in ("teacher", "generation", "value", "temperature")
        ),
        ("assistants.small", None, "assistants.small is None; it must be a mapping"),
        ("baselines.labels.weighting", {"kind": "uniform"}, "baselines.labels.weighting is"),
        ("baselines.uniform.teachers", "nobody", "baselines.uniform.teachers is 'nobody'"),
        (
            "baselines.uniform",
            {"teachers": ["large", "large"], "weighting": {"kind": "uniform"}},
            "baselines.uniform.teachers is ('large', 'large'); it must be names among",
        ),
        (
            "weights",
            {"kind": "fixed", "weights": {"large": 0.5, "medium": 0.2, "smal": 0.3}},
            "weights.weights is {'large': 0.5, 'medium': 0.2, 'smal': 0.3}; it must be given for",
        ),
        (
            "baselines.uniform.weighting",
            {"kind": "fixed", "weights": {"large": 0.5}},
            "baselines.uniform.weighting.weights is {'large': 0.5}; it must be given for",
        ),
        ("exports.onnx.kind", "tflite", "exports.onnx.kind is 'tflite'"),
        ("seed", -1, "seed is -1"),
        ("recipe.mixup", float("inf"), "recipe.mixup is inf"),
        ("student.method.scale", float("inf"), "student.method.scale is inf: input should"),
        ("student.model.kind", ["plain_cnn"], "student.model.kind is ['plain_cnn']"),
        ("recipe.kind", "sgd", "recipe.kind is not a known key"),
        ("recipe.augment.shift", 16, "teacher.recipe.augment.shift is 16; it must be below"),
        (
            "student.method.trust",
            {"kind": "unbiased", "biased": "larg"},
            "student.method.trust.biased is 'larg'; it must be one of ['large', 'medium', ",
        ),
        (
            "student.recipe",
            {"targets": "stacked"},
            "student.recipe.targets is 'stacked'; it must be online or cached: large, medium, ",
        ),
        ("tracking", "perhaps", "tracking is 'perhaps'"),
        ("student", {}, "student.model is missing"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(raw, path, value, said):
    set_at(raw, path, value)
    with pytest.raises(ConfigError, match="^" + re.escape(said)):
        params.parse(raw)


def test_trust_that_reads_labels_is_refused_with_mixup_in_baselines_too(raw):
    raw["student"]["recipe"] = {"mixup": 0.2}
    method = {"kind": "kd", "trust": {"kind": "correctness"}}
    raw["baselines"]["other"] = {"teachers": "teacher", "method": method}
    said = r"recipe\.mixup is 0\.2; it must be 0 with baselines\.other\.method\.trust"
    with pytest.raises(ConfigError, match=said):
        params.parse(raw)


def test_later_generations_know_no_biased_teacher(raw):
    raw["baselines"] = {"labels": {"teachers": "none"}}
    raw["student"]["method"] = {"kind": "kd", "trust": {"kind": "unbiased", "biased": "large"}}
    params.parse(raw)
    raw["student"]["generations"] = 2
    with pytest.raises(ConfigError, match=r"^student\.generations is 2; it must be 1"):
        params.parse(raw)


def test_a_biased_teacher_is_not_the_only_one(raw):
    method = {"kind": "kd", "trust": {"kind": "unbiased", "biased": "large"}}
    raw["baselines"]["other"] = {"teachers": ["large", "small"], "method": method}
    params.parse(raw)
    raw["baselines"]["other"]["teachers"] = ["large"]
    said = r"^baselines\.other\.method\.trust\.biased is 'large'; it must be one of several"
    with pytest.raises(ConfigError, match=said):
        params.parse(raw)


def test_a_method_that_compares_images_has_one_device(raw):
    """Else the student's stage would refuse it, once teacher and assistants are trained."""
    raw["recipe"]["devices"] = 2
    params.parse(raw)
    said = r"student\.recipe\.devices is 2; it must be 1 with %s\.method, which compares"
    dist = {"teachers": "none", "method": {"kind": "dist"}}
    raw["baselines"]["other"] = dist
    params.parse(raw)  # no teacher, and so labels alone
    for entry in ({**dist, "generations": 2}, {**dist, "teachers": "teacher"}):
        raw["baselines"]["other"] = entry
        with pytest.raises(ConfigError, match=said % r"baselines\.other"):
            params.parse(raw)
    del raw["baselines"]["other"]
    raw["student"]["method"] = {"kind": "kd", "trust": {"kind": "drop"}}
    with pytest.raises(ConfigError, match=said % "student"):
        params.parse(raw)


def test_a_missing_section_is_named(raw):
    del raw["weights"]
    with pytest.raises(ConfigError, match=r"^weights is missing"):
        params.parse(raw)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "line 2: the key 'seed' is given twice"),
        ("a:\n  1: x\n  '1': y\n", "line 3: the key '1' is given twice"),
        ("a: [1,\nb: 2}", "line 2: expected ',' or ']', but got '}' (while parsing a flow se"),
        ("\tseed: 1\n", "line 1: found character '\\t' that cannot start any token"),
        ("seed: {{ seed }}\n", "line 1: found unhashable key (while constructing a mapping, "),
        ("seed: 2020-13-01\n", "month must be in 1..12"),
        ("seed: 0 # \a\n", "unacceptable character #x0007: special characters are not allowed"),
        ("- 1\n- 2\n", ""),
        ("", ""),
    ],
)
def test_what_is_no_experiment_is_named_with_its_line(tmp_path, text, said):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))) as error:
        params.load(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"seed: 0 # \xfc"), "'utf-8' codec can't decode"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, make, said):
    make(tmp_path / "params.yaml")
    with pytest.raises(ConfigError, match=f"params.yaml .*{said}"):
        params.load(tmp_path / "params.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="run from the project's root"):
        params.load(tmp_path / "params.yaml")


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = tmp_path / "params.yaml"
    text = (PROJECT / "params.yaml").read_text()
    path.write_text(text.replace("weight_decay: 5.0e-4", "weight_decay: 5e-4"))
    assert params.load(path).teacher.recipe.optimizer.weight_decay == 5e-4


MERGED = """
a: &a {x: 1, z: 5}
b: {c: &c {<<: *a, x: 2}}
d: {<<: *c, y: 3}
"""


@pytest.mark.parametrize("text", [(PROJECT / "params.yaml").read_text(), MERGED])
def test_dvc_reads_the_experiment_as_we_do(tmp_path, text):
    """DVC's YAML is 1.2 and ours 1.1; both must see the same settings."""
    from dvc.utils.serialize import load_yaml

    (tmp_path / "params.yaml").write_text(text)
    ours = build.read_yaml(tmp_path / "params.yaml")
    assert load_yaml(str(tmp_path / "params.yaml")) == ours
    assert ours.get("d") in (None, {"x": 2, "z": 5, "y": 3})


def test_the_package_knows_every_top_level_key():
    keys = {each.name for each in dataclasses.fields(params.Params)}
    assert keys | {"recipe"} == {*STAGES, *SETTINGS}


def test_settings_of_a_stage_are_under_the_same_keys_whatever_its_name():
    read = params.load(PROJECT / "params.yaml")
    large = params.of_stage(read, "assistants", "large")
    small = params.of_stage(read, "assistants", "small")
    assert large.keys() == small.keys()
    assert large["model"] != small["model"]
    assert params.of_stage(read, "weights", "")["weighting"]["kind"] == "differential_evolution"
    assert params.of_stage(read, "exports", "onnx")["export"]["kind"] == "onnx"


def test_cosine_rises_then_falls_to_nothing():
    schedule = Cosine(warmup=0.2)
    assert schedule.factor(0.1) == pytest.approx(0.5)
    assert schedule.factor(0.2) == pytest.approx(1.0)
    assert schedule.factor(0.6) == pytest.approx(0.5)
    assert schedule.factor(1.0) == pytest.approx(0.0)


def test_steps_rise_then_drop_where_a_milestone_is_reached():
    schedule = Steps(milestones=(0.5, 0.75), gamma=0.1, warmup=0.2)
    shares = (0.0, 0.1, 0.2, 0.49, 0.5, 0.75, 1.0)
    found = [schedule.factor(share) for share in shares]
    assert found == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("fused", [True, False])
def test_optimisers_take_every_setting(fused):
    weight = torch.nn.Parameter(torch.zeros(2))
    sgd = SGD(lr=0.3, momentum=0.8, nesterov=False, weight_decay=0.02, fused=fused)
    adamw = AdamW(lr=0.3, betas=(0.7, 0.8), weight_decay=0.02, fused=fused)
    for settings in (sgd, adamw):
        built = settings.build([weight]).defaults
        wanted = {name: getattr(settings, name) for name in vars(settings) if name in built}
        assert {name: built[name] for name in wanted} == {**wanted, "fused": fused or None}
    assert not SGD(momentum=0.0).build([weight]).defaults["nesterov"]


@pytest.mark.parametrize(
    ("of", "field", "refused", "accepted"),
    [
        (SGD, "lr", [0.0, float("inf")], [1e-9]),
        (SGD, "momentum", [-0.01, 1.0], [0.0, 0.999]),
        (SGD, "weight_decay", [-0.01, float("inf")], [0.0]),
        (AdamW, "lr", [0.0, float("inf")], [1e-9]),
        (AdamW, "betas", [(0.9, 1.0), (-0.01, 0.9)], [(0.0, 0.0)]),
        (AdamW, "weight_decay", [-0.01, float("inf")], [0.0]),
        (Cosine, "warmup", [-0.01, 1.0], [0.0, 0.99]),
        (Steps, "milestones", [(0.0,), (1.0,), (0.5, 0.5)], [(), (0.01, 0.99)]),
        (Steps, "gamma", [0.0, 1.01], [0.01, 1.0]),
        (Steps, "warmup", [-0.01, 1.0], [0.0, 0.99]),
        (Recipe, "epochs", [0], [1]),
        (Recipe, "batch_size", [1], [2, 3]),
        (Recipe, "mixup", [-0.01], [0.0, 9.0]),
        (Recipe, "label_smoothing", [-0.01, 1.0], [0.0, 0.99]),
        (Recipe, "clip_norm", [0.0, float("inf")], [0.01, None]),
        (Recipe, "ema", [0.0, 1.0], [0.01, 0.99, None]),
        (Recipe, "views", [0], [1, None]),
        (Recipe, "threads", [0], [1]),
        (Recipe, "devices", [0], [1, 16]),
        (Recipe, "checkpoint_minutes", [-0.01], [0.0]),
        (Recipe, "checkpoint_steps", [0], [1, None]),
        (Recipe, "validate_every", [0], [1]),
    ],
)
def test_settings_of_a_training_are_held_to_their_bounds(of, field, refused, accepted):
    for value in refused:
        with pytest.raises(ConfigError, match=f"^{field} is {re.escape(str(value))}; "):
            of(**{field: value})
    for value in accepted:
        assert getattr(of(**{field: value}), field) == value


def test_settings_that_exclude_each_other_are_refused_together_alone():
    for given, field in (
        ({"devices": 4, "batch_size": 12}, "batch_size"),
        ({"device": "cpu", "precision": "tf32"}, "precision"),
        ({"targets": "cached", "mixup": 0.2}, "mixup"),
    ):
        with pytest.raises(ConfigError, match=f"^{field} is "):
            Recipe(**given)
        for name, value in given.items():
            Recipe(**{name: value})
