"""A method of the user's own, named by import path."""

from dataclasses import field
from typing import Any, ClassVar, Literal

from torch import Tensor

from kd.component import ConfigError, call_object, component
from kd.methods.learning import Learning
from kd.methods.shown import Shown


@component
class CustomMethod(Learning):
    """Any class of your own code that is a `kd.methods.Learning`, or a function that makes one."""

    path: str
    """Where it is, as "package.module:Name"."""

    kind: Literal["custom"] = "custom"

    num_peers: ClassVar[range] = range(100)  # what it needs is known when it is loaded
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the call."""

    def check(self) -> None:
        """Find it; see `resolved`."""
        self.resolved()

    def resolved(self) -> Learning:
        """The method itself.

        Raises:
            ConfigError: it cannot be found or called so, or is no method.
        """
        method = call_object(self.path, self.args, {})
        if not isinstance(method, Learning):
            raise ConfigError(
                f"path {self.path!r} returned a {type(method).__name__}; "
                "it must be a kd.methods.Learning"
            )
        return method

    @property
    def by_image(self) -> bool:
        """The method's own."""
        return self.resolved().by_image

    def labels_alone(self, progress: float) -> bool:
        """The method's own."""
        return self.resolved().labels_alone(progress)

    def loss(self, shown: Shown) -> Tensor:
        """The method's own."""
        return self.resolved().loss(shown)
