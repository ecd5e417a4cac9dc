"""A user-defined method, named by import path."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar, Literal

from torch import Tensor

from kd.component import ConfigError, call_object, component, load_object
from kd.methods.learning import Learning
from kd.methods.shown import Shown
from kd.methods.taught import Taught
from kd.methods.trust import trust_of


@component
class CustomMethod(Learning):
    """A class of your own that is a `kd.methods.Learning`, or a function that returns one."""

    path: str
    """Import path, as "package.module:Name"."""

    kind: Literal["custom"] = "custom"

    num_peers: ClassVar[range] = range(100)  # the method's own range is known once it is loaded
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the call."""

    def check(self) -> None:
        """Check that it can be loaded; see `resolved`."""
        self.resolved()

    def resolved(self) -> Learning:
        """The user's method.

        Raises:
            ConfigError: it cannot be imported or called with `args`, or is no method.
        """
        args = dict(self.args)
        ours = isinstance(made := load_object(self.path), type) and issubclass(made, Taught)
        if ours and isinstance(args.get("trust"), Mapping):
            args["trust"] = trust_of(args["trust"])
        method = call_object(self.path, args, {})
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
