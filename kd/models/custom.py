"""A model of the user's own, named by import path."""

from dataclasses import field
from typing import Any, Literal

from torch import nn

from kd.component import ConfigError, bound_object, call_object, component


@component
class CustomModel:
    """Any class or function of your own code that returns an nn.Module."""

    path: str
    """Import path, "package.module:Name"."""

    kind: Literal["custom"] = "custom"
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the call."""

    def check(self) -> None:
        """Import it, building nothing.

        Raises:
            ConfigError: it cannot be found, or does not take `args`.
        """
        offered = dict.fromkeys(("channels", "image_size", "num_classes"), 1)
        bound_object(self.path, self.args, offered)

    def build(self, *, channels: int, image_size: int, num_classes: int) -> nn.Module:
        """Call it with `args`, and those of channels, image_size, num_classes it takes.

        Raises:
            ConfigError: it cannot be found, the call fails, or it returns no nn.Module.
        """
        offered = {"channels": channels, "image_size": image_size, "num_classes": num_classes}
        network = call_object(self.path, self.args, offered)
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"path {self.path!r} returned a {type(network).__name__}; "
                "it must return an nn.Module"
            )
        return network
