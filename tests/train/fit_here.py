"""fit(), alone or as one rank of several: what test_ranks.py compares."""

import json
import sys

from kd.ensemble import Ensemble
from kd.methods import KD
from kd.train import fit, ranks
from tests.learners import CLASSES, network, pictures, recipe


def fitted(taught: bool, **settings: object) -> dict[str, object]:
    """The losses of the epochs and the weights that training ended with."""
    ensemble = Ensemble((network(5), network(6)), (0.5, 0.5)) if taught else None
    with ranks.group("cpu"):
        model, history = fit(
            network(0),
            pictures(64),
            recipe(**settings),
            seed=0,
            num_classes=CLASSES,
            method=KD() if taught else None,
            ensemble=ensemble,
        )
    return {
        "losses": [epoch.train_loss for epoch in history],
        "weights": {name: t.flatten().tolist() for name, t in model.state_dict().items()},
    }


if __name__ == "__main__":
    found = fitted(**json.loads(sys.argv[1]))
    if ranks.is_first():
        print(json.dumps(found))
