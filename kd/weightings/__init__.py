"""How much each member of an ensemble counts, found on validation data.

A weighting is a component with one method, `find(logits_KNC, labels_N, names, seed, study_path)
-> Found`.  The union below is the registry: params.yaml chooses its members by `kind`.
"""

from kd.weightings.best_single import BestSingle
from kd.weightings.differential_evolution import DifferentialEvolution
from kd.weightings.expectation_maximization import ExpectationMaximization
from kd.weightings.fixed import Fixed
from kd.weightings.found import Found, History
from kd.weightings.greedy import Greedy
from kd.weightings.record import HeldOut, cross_fitted, weight_record
from kd.weightings.tables import convergence_rows, path_rows, tried_rows, weight_metrics
from kd.weightings.uniform import Uniform

Weighting = DifferentialEvolution | ExpectationMaximization | Uniform | BestSingle | Greedy | Fixed

__all__ = [
    "BestSingle",
    "DifferentialEvolution",
    "ExpectationMaximization",
    "Fixed",
    "Found",
    "Greedy",
    "HeldOut",
    "History",
    "Uniform",
    "Weighting",
    "convergence_rows",
    "cross_fitted",
    "path_rows",
    "tried_rows",
    "weight_metrics",
    "weight_record",
]
