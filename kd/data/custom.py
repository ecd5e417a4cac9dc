"""A data set of the user's own, named by import path."""

from dataclasses import field
from typing import Any, Literal

from kd.component import ConfigError, bound_object, call_object, component, raised
from kd.data.raw import Raw


@component
class CustomDataset:
    """Any object of your own code whose `read()` returns a `kd.data.Raw`."""

    path: str
    """Import path "package.module:Name"; called with `args` to make the object."""

    kind: Literal["custom"] = "custom"
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the call."""

    def check(self) -> None:
        """Import it, without reading data.

        Raises:
            ConfigError: it cannot be found, or does not take `args`.
        """
        bound_object(self.path, self.args, {})

    def read(self) -> Raw:
        """Make the object and call its `read()`.

        Raises:
            ConfigError: it has none, or that raises or returns something else.
        """
        dataset = call_object(self.path, self.args, {})
        if not callable(getattr(dataset, "read", None)):
            raise ConfigError(
                f"path {self.path!r}: the {type(dataset).__name__} has no method read()"
            )
        try:
            raw = dataset.read()
        except ConfigError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(f"path {self.path!r}: read() raised {raised(error)}") from error
        if not isinstance(raw, Raw):
            raise ConfigError(
                f"path {self.path!r}: read() returned a {type(raw).__name__}; "
                "it must return a kd.data.Raw"
            )
        return raw
