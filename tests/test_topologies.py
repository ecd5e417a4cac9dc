"""Who teaches whom: chains, dense guidance, everyone, generations, peers, through the stages."""

import pytest
import torch
import yaml

from kd import artifacts, cast, manifest, params, stages
from kd.artifacts import ArtifactError
from kd.component import ConfigError
from kd.tracking import NullRun
from tests.test_pipeline import PROJECT, run_stages

DML = {"kind": "dml"}
PLAIN = {"kind": "plain_cnn", "depth": 2, "width": 0.5}
BASELINES = {
    "labels": {"teachers": "none"},
    "takd": {"teachers": ["small"]},
    "dgkd": {
        "teachers": ["teacher", "large", "medium", "small"],
        "method": {"kind": "kd", "scale": 5.0, "trust": {"kind": "drop"}},
    },
    "everyone": {"teachers": "everyone", "weighting": {"kind": "expectation_maximization"}},
    "born_again": {"teachers": "none", "generations": 2},
    "dml": {"teachers": "none", "method": DML, "peers": {"twin": PLAIN}},
    "own_mean": {"teachers": "none", "method": {"kind": "own_mean"}},
    "gated": {
        "teachers": "everyone",
        "weighting": {"kind": "uniform"},
        "method": {"kind": "gated"},
    },
    "unbiased": {
        "teachers": ["large", "medium", "small"],
        "method": {"kind": "kd", "trust": {"kind": "unbiased", "biased": "small"}},
    },
}


def raw_experiment():
    raw = yaml.safe_load((PROJECT / "params.yaml").read_text())
    raw |= {"tracking": False, "baselines": BASELINES}
    raw["recipe"] |= {"epochs": 1, "batch_size": 256}
    for section in (raw["teacher"], *raw["assistants"].values()):
        section["model"] = {"kind": "plain_cnn", "depth": 4, "width": 0.25}
    raw["weights"] = {"kind": "uniform"}
    raw["assistants"]["medium"]["taught_by"] = "assistants/large"
    raw["assistants"]["small"] |= {"taught_by": "assistants/medium", "dense": True}
    raw["student"]["teacher_share"] = 0.25
    return raw


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("topologies")
    (folder / "params.yaml").write_text(yaml.safe_dump(raw_experiment(), sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stages(["data", "teacher", *(f"assistants@{n}" for n in ("large", "medium", "small"))])
        run_stages(["weights", "student", *(f"baselines@{name}" for name in BASELINES)])
    return folder


@pytest.fixture
def here(finished, monkeypatch):
    monkeypatch.chdir(finished)
    return finished


def taught_by(run_name):
    return [origin.name for origin in manifest.read(artifacts.folder(run_name)).teachers]


def test_a_chain_is_taught_by_the_one_before_and_a_dense_one_by_all(here):
    assert taught_by("assistants/large") == ["teacher"]
    assert taught_by("assistants/medium") == ["assistants/large"]
    assert taught_by("assistants/small") == ["assistants/medium", "assistants/large", "teacher"]
    assert manifest.read(artifacts.folder("assistants/small")).weights_K == (1 / 3,) * 3


def test_a_student_may_be_taught_by_the_last_of_the_chain_or_by_all(here):
    assert taught_by("baselines/takd") == ["assistants/small"]
    assert taught_by("baselines/dgkd") == [
        "teacher",
        "assistants/large",
        "assistants/medium",
        "assistants/small",
    ]


def test_the_teacher_takes_its_share_beside_the_weighed_assistants(here):
    described = manifest.read(artifacts.folder("student"))
    assert described.teachers[-1].name == "teacher"
    assert described.weights_K[-1] == 0.25
    assert sum(described.weights_K) == pytest.approx(1)


def test_everyone_is_weighed_with_the_teacher_among_them(here):
    described = manifest.read(artifacts.folder("baselines/everyone"))
    names = [origin.name for origin in described.teachers]
    assert names == ["assistants/large", "assistants/medium", "assistants/small", "teacher"]
    logits_KNC, labels_N = cast.val_logits(("large", "medium", "small", "teacher"))
    read = params.load()
    found = read.baselines["everyone"].weighting.find(
        logits_KNC.numpy(), labels_N.numpy(), tuple("abcd"), 0
    )
    assert described.weights_K == pytest.approx(tuple(found.weights.values()))


def test_a_second_generation_costs_twice_and_differs_from_the_first(here):
    once = artifacts.read_json(artifacts.ROOT / "baselines/labels/metrics.json")
    twice = artifacts.read_json(artifacts.ROOT / "baselines/born_again/metrics.json")
    assert twice["samples_seen"] == 2 * once["samples_seen"]
    described = manifest.read(artifacts.folder("baselines/born_again"))
    assert described.generations == 2
    assert described.method["kind"] == "kd"
    assert described.sha256 != manifest.read(artifacts.folder("baselines/labels")).sha256


def test_what_is_kept_of_a_cohort_is_the_student_alone(here):
    peer_taught, described = manifest.load(artifacts.folder("baselines/dml"))
    assert described.peers["twin"]["depth"] == 2
    labels, _ = manifest.load(artifacts.folder("baselines/labels"))
    assert peer_taught.state_dict().keys() == labels.state_dict().keys()
    assert described.teachers == ()


def test_every_topology_is_reproducible_to_the_bit(here, tmp_path):
    read = params.load()
    for name in ("dgkd", "born_again", "dml", "gated"):
        before = manifest.read(artifacts.folder(f"baselines/{name}")).sha256
        stages.STAGES["baselines"](read, name, NullRun())
        assert manifest.read(artifacts.folder(f"baselines/{name}")).sha256 == before
    assert not list((here / ".kd/checkpoints").rglob("*.safetensors"))


def test_an_assistant_whose_teacher_changed_teaches_nobody(here):
    path = artifacts.folder("assistants/medium") / "manifest.json"
    original = path.read_text()
    record = artifacts.read_json(path)
    record["teachers"][0]["sha256"] = "0" * 64
    try:
        artifacts.write_json(path, record)
        with pytest.raises(ArtifactError, match="taught by another assistants/large"):
            stages.STAGES["assistants"](params.load(), "small", NullRun())
    finally:
        path.write_text(original)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"large": "assistants/small"}, "assistants.large.taught_by is"),
        ({"large": "assistants/large"}, "assistants.large.taught_by is"),
        ({"large": "assistants/huge"}, "assistants.large.taught_by is"),
        ({"large": "medium"}, "assistants.large.taught_by is 'medium'"),
    ],
)
def test_a_chain_must_lead_to_the_teacher(changes, said):
    raw = raw_experiment()
    for name, above in changes.items():
        raw["assistants"][name]["taught_by"] = above
    with pytest.raises(ConfigError, match=said):
        params.parse(raw)


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ({"teachers": ["huge"]}, r"baselines.x.teachers is \('huge',\)"),
        ({"teachers": []}, "baselines.x.teachers is"),
        ({"teachers": "everyone"}, "baselines.x.weighting is None; it must be given"),
        ({"teachers": "teacher", "weighting": {"kind": "uniform"}}, "baselines.x.weighting is"),
        ({"teachers": "teacher", "method": {"kind": "labels"}}, "baselines.x.teachers is"),
        ({"teachers": "none", "method": DML}, r"baselines.x.peers is \[\]; it must be 1 to"),
        ({"teachers": "teacher", "peers": {"a": PLAIN}, "method": {"kind": "kd"}}, "peers is"),
        ({"teachers": "none", "peers": {"a": PLAIN}}, "baselines.x.peers is"),
        ({"teachers": "none", "generations": 0}, "baselines.x.generations is 0"),
    ],
)
def test_baselines_that_make_no_sense_are_refused(baseline, said):
    raw = raw_experiment() | {"baselines": {"x": baseline}}
    with pytest.raises(ConfigError, match=said):
        params.parse(raw)


def test_trust_that_reads_labels_is_refused_with_mixed_images():
    raw = raw_experiment()
    raw["recipe"]["mixup"] = 0.2
    raw["student"]["method"] = {"kind": "kd", "trust": {"kind": "confidence"}}
    with pytest.raises(ConfigError, match=r"student.recipe.mixup is 0\.2"):
        params.parse(raw)


def test_peers_begin_with_weights_of_their_own(here):
    described = manifest.read(artifacts.folder("baselines/dml"))
    torch.manual_seed(0)
    student, peer = described.build(), described.build(described.peers["twin"])
    assert not torch.equal(next(student.parameters()), next(peer.parameters()))
