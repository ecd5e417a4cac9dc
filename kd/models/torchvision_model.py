"""Any of torchvision's image classifiers, by name."""

import difflib
import inspect
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from kd.component import ConfigError, component

# Otherwise they return auxiliary classifiers' logits too in training mode, and warn about a slow
# initialisation.
_PLAIN = {"aux_logits": False, "init_weights": True}
_DEFAULT_ARGS: dict[str, dict[str, Any]] = {"googlenet": _PLAIN, "inception_v3": _PLAIN}


@component
class TorchvisionModel:
    """A classifier of torchvision.models, fitted to the images' channels and classes."""

    name: str
    """torchvision's name: "mobilenet_v3_small", "resnet18", ..."""

    kind: Literal["torchvision"] = "torchvision"
    weights: Literal["none", "default"] = "none"
    """Random initial weights, or torchvision's best for ImageNet (downloaded once)."""

    args: dict[str, Any] = field(default_factory=dict)
    """More keyword arguments for torchvision's builder."""

    def check(self) -> None:
        """Check the name and the arguments, without building anything.

        Raises:
            ConfigError: no such name, or arguments that it does not take.
        """
        from torchvision import models

        known = models.list_models(module=models)
        if self.name not in known:
            raise ConfigError(
                f"name {self.name!r} is not a torchvision classifier; {nearest(self.name, known)}"
            )
        taken = keywords(models.get_model_builder(self.name))
        for arg in self.args:
            if arg not in taken:
                raise ConfigError(
                    f"args has {arg!r}, which {self.name} does not take; {nearest(arg, taken)}"
                )

    def build(self, *, channels: int, image_size: int, num_classes: int) -> nn.Module:
        """Make the network; with weights, all but the class layer is pretrained on ImageNet.

        Raises:
            ConfigError: no such name, arguments that it does not take, or weights that cannot be
                downloaded.
        """
        from torchvision import models

        self.check()
        args = {"num_classes": num_classes, **_DEFAULT_ARGS.get(self.name, {}), **self.args}
        if self.name.startswith("vit_"):
            args.setdefault("image_size", image_size)
        try:
            network: nn.Module = models.get_model(self.name, weights=None, **args)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{self.name} cannot be built with {args} ({error}); see args"
            ) from error
        _settle_within_hundreds_of_steps(network)
        if self.weights == "default":
            weights = _fetch(models.get_model_weights(self.name).DEFAULT)
            _load_all_but_classifier(self.name, network, weights)
        if channels == 1:
            _make_grey(network)
        return network


def nearest(name: str, known: Iterable[str]) -> str:
    """The nearest known names, as the end of a sentence."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"nearest: {', '.join(near) or 'none, see torchvision.models'}"


def keywords(builder: Callable[..., nn.Module]) -> set[str]:
    """All keyword arguments that a builder may take.

    Builders pass **kwargs on to functions and classes of their own module, some of which silently
    ignore unknown ones: so only arguments that one of these names in its signature are accepted.
    """
    own = [
        each
        for each in vars(inspect.getmodule(builder)).values()
        if callable(each) and getattr(each, "__module__", "") == builder.__module__
    ]
    return {name for each in own for name in inspect.signature(each).parameters}


def _fetch(weights: Any) -> Mapping[str, Tensor]:
    """The pretrained tensors, from torch's cache or the network; only tensors are unpickled."""
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
        raise ConfigError(
            f"weights 'default': cannot load {weights.url} ({error}); fetch it on another "
            f"machine and place it as {file}, or set weights: none"
        ) from error
    return state


def _load_all_but_classifier(name: str, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights that fit; only the class layer's may not fit."""
    own = network.state_dict()
    fits = {
        key: weights[key]
        for key, value in own.items()
        if key in weights and weights[key].shape == value.shape
    }
    fresh = {key.rpartition(".")[0] for key in own.keys() - fits.keys()}
    if len(fresh) > 1:
        raise ConfigError(
            f"weights 'default': they do not fit {name} with these args "
            f"(in {', '.join(sorted(fresh))}); set weights: none or remove args"
        )
    network.load_state_dict(fits, strict=False)


def _settle_within_hundreds_of_steps(network: nn.Module) -> None:
    """Have batch norms take at least a tenth of each batch's statistics, torch's default.

    torchvision's networks for phones take 1 % (MobileNetV3) or 0.03 % (MNASNet), for runs of a
    hundred thousand steps; after a few hundred they would still judge by what they began with.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.momentum is not None:
            module.momentum = max(module.momentum, 0.1)


def _make_grey(network: nn.Module) -> None:
    """Take one channel: a grey image gives the same logits as its repetition in colour would."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.in_channels = 1
    first.weight = nn.Parameter(first.weight.detach().sum(1, keepdim=True))
