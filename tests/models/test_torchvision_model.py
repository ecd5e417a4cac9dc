from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import models

from kd.component import ConfigError
from kd.models import TorchvisionModel, build_model

NAME = "squeezenet1_1"
PRETRAINED = TorchvisionModel(name=NAME, weights="default")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of torch that holds a checkpoint in the place of the published one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.get_model_weights(NAME).DEFAULT.url
    path = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.manual_seed(9)
    torch.save(models.get_model(NAME).state_dict(), path)
    return path


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(ConfigError, match=r"'resnet19' is not .*nearest: resnet18"):
        TorchvisionModel(name="resnet19").build(channels=3, image_size=32, num_classes=2)


@pytest.mark.parametrize(
    ("name", "nearest"), [(NAME, "progress"), ("mobilenet_v3_small", "progress")]
)
def test_arguments_that_nobody_takes_are_refused(name: str, nearest: str) -> None:
    model = TorchvisionModel(name=name, args={"progres": 1})
    with pytest.raises(
        ConfigError, match=f"args has 'progres', which {name} .*nearest: {nearest}"
    ):
        model.build(channels=3, image_size=32, num_classes=2)


def test_arguments_with_values_that_cannot_be_are_refused() -> None:
    model = TorchvisionModel(name=NAME, args={"version": "9_9"})
    with pytest.raises(ConfigError, match="cannot be built with"):
        model.build(channels=3, image_size=32, num_classes=2)


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_what_classifiers_take_can_be_said_of_each(name: str) -> None:
    TorchvisionModel(name=name, args={"num_classes": 2, "progress": False}).check()


def test_what_a_builder_hands_on_to_a_helper_is_taken() -> None:
    args = {"reduced_tail": True, "width_mult": 0.5}
    model = TorchvisionModel(name="mobilenet_v3_small", args=args)
    model.build(channels=3, image_size=32, num_classes=2)


def test_pretrained_weights_fill_all_but_the_class_layer(cached: Path) -> None:
    published = torch.load(cached, weights_only=True)
    own = build_model(PRETRAINED, channels=3, image_size=64, num_classes=7).state_dict()
    for key, value in own.items():
        if key.startswith("classifier.1."):
            assert value.shape[0] == 7
        else:
            assert torch.equal(value, published[key])


def test_a_grey_image_gets_the_answer_of_its_repetition_in_colour(cached: Path) -> None:
    networks = []
    for channels in (1, 3):
        torch.manual_seed(0)
        networks.append(
            build_model(PRETRAINED, channels=channels, image_size=64, num_classes=7).eval()
        )
    images = torch.randn(2, 1, 64, 64)
    grey, colour = networks[0](images), networks[1](images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey, colour, rtol=1e-4, atol=1e-5)


def test_weights_that_do_not_fit_beyond_the_class_layer_are_refused(cached: Path) -> None:
    torch.save(models.get_model("squeezenet1_0").state_dict(), cached)
    with pytest.raises(ConfigError, match="do not fit squeezenet1_1"):
        PRETRAINED.build(channels=3, image_size=64, num_classes=7)


def test_weights_that_cannot_be_fetched_say_where_to_place_them(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    cached.unlink()
    with pytest.raises(ConfigError, match=f"place it as {cached}"):
        PRETRAINED.build(channels=3, image_size=64, num_classes=7)


def test_a_corrupt_file_of_weights_is_named(cached: Path) -> None:
    cached.write_bytes(b"no checkpoint")
    with pytest.raises(ConfigError, match=f"place it as {cached}"):
        PRETRAINED.build(channels=3, image_size=64, num_classes=7)


@pytest.mark.slow
def test_a_model_with_auxiliary_logits_returns_one_tensor_in_training() -> None:
    model = TorchvisionModel(name="googlenet", args={"init_weights": False})
    build_model(model, channels=3, image_size=32, num_classes=2)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mnasnet0_5"])
def test_batch_norms_know_the_images_after_some_dozens_of_steps(name: str) -> None:
    torch.manual_seed(0)
    model = TorchvisionModel(name=name).build(channels=3, image_size=32, num_classes=3)
    norm = next(each for each in model.modules() if isinstance(each, nn.BatchNorm2d))
    seen = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean((0, 2, 3))))
    model.train()
    with torch.no_grad():
        for _ in range(50):
            model(3 + torch.rand(4, 3, 32, 32))
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0), rtol=0.02, atol=0.02)


def test_a_vision_transformer_takes_the_size_of_the_images() -> None:
    network = TorchvisionModel(name="vit_b_32").build(channels=3, image_size=64, num_classes=2)
    assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


def test_images_too_small_for_the_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot take images of 3 x 16 x 16"):
        build_model(TorchvisionModel(name="alexnet"), channels=3, image_size=16, num_classes=2)
