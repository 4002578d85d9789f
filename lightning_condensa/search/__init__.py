"""How far can it go: constrained Bayesian optimization over Trainer runs."""

from lightning_condensa.schemes import Choice, Range
from lightning_condensa.search.allocation import allocate
from lightning_condensa.search.condensa_search import CondensaSearch
from lightning_condensa.search.executors import (
    DaskExecutor,
    MPIExecutor,
    ProcessPool,
    RayExecutor,
    SubmititExecutor,
)
from lightning_condensa.search.grouping import groups_by_sensitivity
from lightning_condensa.search.observation import Observation
from lightning_condensa.search.problem import Problem
from lightning_condensa.search.rescoring import Rescored
from lightning_condensa.search.result import SearchResult
from lightning_condensa.search.sampler import CondensaSampler
from lightning_condensa.search.sensitivity import Sensitivity
from lightning_condensa.search.strategies import Strategy, make_strategy
from lightning_condensa.search.trials import Baseline, Curve, ObjectiveInfo, Trial

__all__ = [
    "Baseline",
    "Choice",
    "CondensaSampler",
    "CondensaSearch",
    "Curve",
    "DaskExecutor",
    "MPIExecutor",
    "ObjectiveInfo",
    "Observation",
    "Problem",
    "ProcessPool",
    "Range",
    "RayExecutor",
    "Rescored",
    "SearchResult",
    "Sensitivity",
    "Strategy",
    "SubmititExecutor",
    "Trial",
    "allocate",
    "groups_by_sensitivity",
    "make_strategy",
]
