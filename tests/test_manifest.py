import json
from dataclasses import replace

import pytest
import torch

from kd import manifest
from kd.artifacts import ArtifactError
from kd.manifest import Manifest, Origin


@pytest.fixture
def described():
    return Manifest(
        name="student",
        role="student",
        model={"kind": "plain_cnn", "depth": 2, "table": "cifar10", "width": 0.5},
        channels=1,
        image_size=16,
        class_names=("0", "1"),
        mean=(0.3,),
        std=(0.4,),
        data_hash="d",
        teachers=(Origin(name="assistants/large", sha256="l"),),
        weights_K=(1.0,),
        mixing="probabilities",
        method={"kind": "kd", "temperature": 4.0, "alpha": 0.9},
        recipe={"epochs": 1},
        seed=3,
        code="c",
        device="cpu",
    )


def test_a_trained_network_comes_back_with_all_that_is_known_of_it(tmp_path, described):
    torch.manual_seed(0)
    network = described.build()
    written = manifest.save(tmp_path, network, described)
    loaded, read = manifest.load(tmp_path)
    assert read == written
    assert not loaded.training
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(loaded(images), network.eval()(images))


def test_weights_that_were_swapped_are_refused(tmp_path, described):
    manifest.save(tmp_path, described.build(), described)
    other = tmp_path / "other"
    other.mkdir()
    torch.manual_seed(1)
    manifest.save(other, described.build(), described)
    (other / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="is not the file that"):
        manifest.load(tmp_path)


def test_a_manifest_of_another_format_is_refused(tmp_path, described):
    manifest.save(tmp_path, described.build(), replace(described, format=99))
    with pytest.raises(ArtifactError, match="has format 99"):
        manifest.read(tmp_path)


def test_a_manifest_that_lacks_something_is_damaged(tmp_path, described):
    manifest.save(tmp_path, described.build(), described)
    path = tmp_path / "manifest.json"
    record = json.loads(path.read_text())
    del record["data_hash"]
    path.write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"is damaged .*data_hash"):
        manifest.read(tmp_path)


@pytest.mark.parametrize(
    "model",
    [{"kind": "gone"}, {"depth": 2}, {"kind": "plain_cnn", "depth": 2, "gone": 1}],
    ids=["kind", "no kind", "field"],
)
def test_a_model_that_this_code_does_not_know_is_named(tmp_path, described, model):
    manifest.save(tmp_path, described.build(), replace(described, model=model))
    with pytest.raises(ArtifactError, match=r"student has the model \{.*does not know"):
        manifest.load(tmp_path)


def test_members_of_one_lineage_may_teach(described):
    manifest.check_lineage([described], {"assistants/large": "l"}, "d")


def test_a_member_trained_on_other_data_is_refused(described):
    with pytest.raises(ArtifactError, match="student was trained on other data"):
        manifest.check_lineage([described], {}, "other")


def test_a_member_taught_by_another_teacher_is_refused(described):
    with pytest.raises(ArtifactError, match="taught by another assistants/large"):
        manifest.check_lineage([described], {"assistants/large": "changed"}, "d")
