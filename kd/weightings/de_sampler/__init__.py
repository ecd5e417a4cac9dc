"""DESampler: differential evolution behind Optuna's sampler interface.

The search's state is a pure function of (seed, storage).  With NP the population size, trial n is
slot n % NP of generation n // NP; a slot's occupant is its best finished trial; each generation is
drawn at once from a counter-based generator keyed (seed, generation), and generation g depends
only on trials numbered below g NP.  So only trials are stored, a new process rebuilds everything
by replaying them, and sequential, batched and resumed searches are bit-identical.

This is the only package of kd that imports optuna, and it uses private parts of it: `_storage` and
`_study_id`, as Optuna's own samplers do (the public way copies every trial), and `Trial._suggest`.

Imports go down: search, batch, sampler, replay, space; journal stands alone.
"""

from kd.weightings.de_sampler.batch import (
    BatchObjective,
    DEConvergedCallback,
    PrefetchObjective,
    optimize_population,
)
from kd.weightings.de_sampler.journal import GenerationJournalBackend
from kd.weightings.de_sampler.replay import Generation
from kd.weightings.de_sampler.sampler import SEED_ATTRIBUTE, DESampler
from kd.weightings.de_sampler.search import search_weights

__all__ = [
    "SEED_ATTRIBUTE",
    "BatchObjective",
    "DEConvergedCallback",
    "DESampler",
    "Generation",
    "GenerationJournalBackend",
    "PrefetchObjective",
    "optimize_population",
    "search_weights",
]
