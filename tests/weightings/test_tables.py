import numpy as np

from kd.weightings import (
    Greedy,
    convergence_rows,
    path_rows,
    tried_rows,
    weight_metrics,
    weight_record,
)
from tests.checks_weightings import names
from tests.reference_weightings import random_logits


def test_tables_have_a_row_per_generation_and_plain_numbers():
    logits_KNC, labels_N = random_logits(3, 60, 4)
    weighting = Greedy(steps=4)
    found = weighting.find(logits_KNC, labels_N, names(3), 0)
    rows = convergence_rows(found)
    assert [row["generation"] for row in rows] == [0, 1, 2, 3]
    assert [row["evaluations"] for row in rows] == [3, 6, 9, 12]
    assert [row["best"] for row in rows] == found.history.best_G.tolist()
    path = path_rows(found)
    np.testing.assert_array_equal(
        [[row[name] for name in names(3)] for row in path], found.history.weights_GK
    )
    tried = tried_rows(found)
    np.testing.assert_array_equal([row["value"] for row in tried], found.history.values_M)
    assert set(tried[0]) == {*names(3), "value"}
    metrics = weight_metrics(weight_record(weighting, found, logits_KNC, labels_N, 0))
    assert set(metrics["held_out_nll"]) >= {"chosen", "uniform", "best_single"}
