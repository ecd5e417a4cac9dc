"""A weighting that does less than the battery asks for."""

from typing import Literal

import numpy as np
import pytest

from kd.component import component
from kd.weightings import Found
from tests.checks_weightings import check_weighting


@component
class Half:
    """Forgets that weights sum to 1, and has no history."""

    kind: Literal["half"] = "half"

    def find(self, logits_KNC, labels_N, names, seed, study_path=None):
        return Found(names, np.full(len(names), 0.5), 0.0, None)


def test_the_battery_names_the_check_that_fails():
    with pytest.raises(AssertionError, match=r"^Half fails check_a_lone_member"):
        check_weighting(Half())
