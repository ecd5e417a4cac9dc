"""The module that a method trains, made of a network and its peers."""

from collections.abc import Mapping

from torch import nn

from kd.component import ConfigError, require
from kd.methods.learner import Learner
from kd.methods.learning import Learning
from kd.methods.shown import Members


def surrounded(
    network: nn.Module,
    method: Learning,
    peers: Mapping[str, nn.Module],
    members: Members | None = None,
) -> nn.Module:
    """The module to train: the network, with whatever its method trains along with it.

    Raises:
        ConfigError: there are too few or too many peers, the method cannot use these networks, or
            its learner does not hold the network, which is what is kept in the end.
    """
    wanted = f"from {method.num_peers.start} to {method.num_peers.stop - 1} networks"
    require(len(peers) in method.num_peers, "peers", sorted(peers), wanted)
    learner = method.learner(network, list(peers.values()), members)
    holds = isinstance(learner, Learner) and learner.student is network
    if learner is not network and not holds:
        raise ConfigError(
            f"{type(method).__name__}.learner returned a {type(learner).__name__}; it must return "
            "the student, or a kd.methods.Learner that holds it"
        )
    return learner
