"""How far can it go: constrained Bayesian optimization over Trainer runs."""

from lightning_condensa.schemes import Choice, Range
from lightning_condensa.search.allocation import allocate
from lightning_condensa.search.condensa_search import CondensaSearch
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.result import Baseline, Curve, SearchResult, Trial
from lightning_condensa.search.sensitivity import Sensitivity
from lightning_condensa.search.strategies import Strategy, make_strategy

__all__ = [
    "Baseline",
    "Choice",
    "CondensaSearch",
    "Curve",
    "Observation",
    "Problem",
    "Range",
    "SearchResult",
    "Sensitivity",
    "Strategy",
    "Trial",
    "allocate",
    "make_strategy",
]
