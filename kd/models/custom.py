"""A model of the user's own, named by import path."""

import inspect
from dataclasses import field
from typing import Any, Literal

from torch import nn

from kd.component import ConfigError, component, load_object


@component
class CustomModel:
    """Any class or function of your own code that returns an nn.Module."""

    path: str
    """Where it is, as "package.module:Name"."""

    kind: Literal["custom"] = "custom"
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the call."""

    def build(self, *, channels: int, image_size: int, num_classes: int) -> nn.Module:
        """Call it with `args`, and with those of channels, image_size and num_classes it names.

        Raises:
            ConfigError: it cannot be found or called so, or returns no nn.Module.
        """
        factory = load_object(self.path)
        if not callable(factory):
            raise ConfigError(
                f"path {self.path!r} names a {type(factory).__name__}, not a function"
            )
        offered = {"channels": channels, "image_size": image_size, "num_classes": num_classes}
        parameters = inspect.signature(factory).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        taken = {name: value for name, value in offered.items() if takes_any or name in parameters}
        args = {**taken, **self.args}
        try:
            network = factory(**args)
        except TypeError as error:
            raise ConfigError(
                f"path {self.path!r} cannot be called with {args} ({error})"
            ) from error
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"path {self.path!r} returned a {type(network).__name__}; "
                "it must return an nn.Module"
            )
        return network
