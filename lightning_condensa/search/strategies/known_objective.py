"""The default: the objective is known, only feasibility is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from botorch.optim.optimize import optimize_acqf_discrete
from torch import Tensor

from lightning_condensa.search import pool
from lightning_condensa.search.acquisition import KnownObjectiveCEI
from lightning_condensa.search.domain import Domain, distinct
from lightning_condensa.search.ensemble import DamageMixture
from lightning_condensa.search.feasibility import FeasibilityModel, feasible_ones
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.strategies.base import Strategy, occupied
from lightning_condensa.search.surrogates import BilogGP, CliffEnsemble

__all__ = ["KnownObjectiveStrategy"]

#: Evaluations with one strength for all before the groups may differ.
_TOGETHER = 3
#: Evaluations up to which damages that add up explain more than a process without a form.
_ENSEMBLE_UP_TO = 40
#: Models of an ensemble whose frontiers become candidates.
_FRONTIERS = 24
_AROUND = 384
_RANDOM = 128
#: Rounds of a climb from the best candidates, and from how many.
_ROUNDS = 2
_CLIMBERS = 12
#: Candidates whose objective is looked up where it is slow.
_EXACT = 12


class KnownObjectiveStrategy(Strategy):
    """Constrained expected improvement of the known objective, for any number of coordinates.

    The surrogate is the `CliffEnsemble` where the problem says that its curves apply. With a
    domain of several dimensions and an accuracy it is the `DamageMixture`; candidates are then the
    frontiers of its members, points between these and the incumbent, around it, and everywhere.
    For other metrics, and beyond 40 evaluations, it is the `BilogGP` in a trust region.

    Example:
        >>> u = torch.linspace(0.1, 5.0, 50, dtype=torch.float64)
        >>> dense = Observation(torch.zeros(1), metric=0.98, variance=1e-6, utility=0.0)
        >>> problem = Problem(u[:, None], u, dense, level=0.97, noise_variance=1e-6, cliff=True)
        >>> first = KnownObjectiveStrategy().propose(problem, [], None, q=1, seed=0)
        >>> len(first), 0 <= first[0] < 50
        (1, True)
    """

    def surrogate(
        self, problem: Problem, history: Sequence[Observation], seed: int
    ) -> FeasibilityModel:
        """What is believed of the metric after ``history``; also for plots."""
        if problem.cliff:
            return CliffEnsemble(problem, history, seed)
        if problem.accuracy and len(history) <= _ENSEMBLE_UP_TO:
            return DamageMixture(problem, history, seed)
        return BilogGP(problem, history, seed)

    def suggest(
        self,
        problem: Problem,
        history: Sequence[Observation],
        pending: Tensor | None,
        q: int,
        seed: int,
    ) -> Tensor:
        """Points to evaluate; with a domain from all its combinations."""
        if problem.domain is None:
            return super().suggest(problem, history, pending, q, seed)
        pending, _ = self._checked(problem, history, pending, q)
        model = self.surrogate(problem, history, seed)
        good = feasible_ones(problem, history, model)
        local = _candidates(problem, problem.domain, model, history, good, pending, seed)
        _, free = self._checked(local, history, pending, q)
        q = min(q, int(free.sum()))
        return local.candidates[_chosen(local, model, history, good, pending, free, q)]

    def _select(
        self,
        problem: Problem,
        history: Sequence[Observation],
        pending: Tensor,
        free: Tensor,
        q: int,
        seed: int,
    ) -> list[int]:
        model = self.surrogate(problem, history, seed)
        good = feasible_ones(problem, history, model)
        return _chosen(problem, model, history, good, pending, free, q)


def _chosen(
    problem: Problem,
    model: FeasibilityModel,
    history: Sequence[Observation],
    good: Sequence[bool],
    pending: Tensor,
    free: Tensor,
    q: int,
) -> list[int]:
    """The ``q`` free candidates of greatest joint acquisition."""
    incumbent = _incumbent(problem, history, good)
    promising = free & (problem.utility > incumbent)
    chosen = problem.candidates.new_empty(0, pending.shape[-1])
    if bool(promising.any()):
        chosen, _ = optimize_acqf_discrete(
            _acquisition(problem, model, incumbent, pending),
            q=min(q, int(promising.sum())),
            choices=problem.candidates[promising],
            return_acq_values=False,
        )
    best = problem.nearest(chosen).tolist()
    # What cannot improve is only proposed when nothing else is left; those nearest to an
    # improvement are of most use as reserves.
    reserve = problem.utility.masked_fill(~free | promising, -torch.inf)
    return [*best, *reserve.argsort(descending=True).tolist()][:q]


def _acquisition(
    problem: Problem, model: FeasibilityModel, incumbent: float, pending: Tensor
) -> KnownObjectiveCEI:
    competing = pending[problem.utility_at(pending) > incumbent]
    return KnownObjectiveCEI(
        model, problem.utility_at, incumbent, X_pending=competing if len(competing) else None
    )


def _candidates(
    problem: Problem,
    domain: Domain,
    model: FeasibilityModel,
    history: Sequence[Observation],
    good: Sequence[bool],
    pending: Tensor,
    seed: int,
) -> Problem:
    """The problem with candidates that this model finds worth a look."""
    taken = domain.nearest(torch.cat([pending, *(seen.point[None] for seen in history)]))
    if len(taken) < _TOGETHER:
        level = torch.cat([domain.diagonals(), taken])
        local = _restricted(problem, domain, level)
    else:
        level = torch.cat([*_combinations(problem, domain, model, history, good, seed), taken])
        local = _restricted(problem, domain, level)
        for _ in range(_ROUNDS):
            best = _best(local, model, history, good, pending, _CLIMBERS)
            level = torch.cat([domain.nearest(local.candidates), pool.neighbours(domain, best)])
            local = _restricted(problem, domain, level)
    if domain.exact is None:
        return local
    # Few enough to ask the objective itself.
    level = torch.cat([_best(local, model, history, good, pending, _EXACT), taken])
    return _restricted(problem, replace(domain, utility=domain.exact), level)


def _restricted(problem: Problem, domain: Domain, level: Tensor) -> Problem:
    """The problem with these combinations as its candidates."""
    level = distinct(level)
    return replace(
        problem,
        candidates=domain.points(level),
        utility=domain.utility(level),
        domain=domain,
    )


def _best(
    problem: Problem,
    model: FeasibilityModel,
    history: Sequence[Observation],
    good: Sequence[bool],
    pending: Tensor,
    count: int,
) -> Tensor:
    """The combinations of greatest acquisition among the free candidates, each by itself."""
    assert problem.domain is not None
    taken = torch.cat([pending, *(seen.point[None] for seen in history)])
    incumbent = _incumbent(problem, history, good)
    acquisition = _acquisition(problem, model, incumbent, pending)
    value = acquisition(problem.candidates.unsqueeze(-2))
    value = value.masked_fill(occupied(problem.candidates, taken), -torch.inf)
    best = value.topk(min(count, len(value))).indices
    return problem.domain.nearest(problem.candidates[best])


def _combinations(
    problem: Problem,
    domain: Domain,
    model: FeasibilityModel,
    history: Sequence[Observation],
    good: Sequence[bool],
    seed: int,
) -> list[Tensor]:
    """Frontiers of the model's members, what lies between them and the incumbent, and more."""
    generator = torch.Generator().manual_seed(seed)
    value = _values(problem, history, good)
    diagonals = domain.diagonals()
    centre = diagonals[0]
    if any(good):
        winner = history[max(range(len(history)), key=value.__getitem__)]
        centre = domain.nearest(winner.point[None])[0]
    length = pool.trust_region(value, len(domain.axes))
    level = [
        diagonals,
        domain.random(_RANDOM, seed),
        pool.around(domain, centre, length, _AROUND, generator),
        pool.around(domain, centre, length / 4, _AROUND, generator),
    ]
    if isinstance(model, DamageMixture):
        some = torch.multinomial(model.log_weights.exp(), _FRONTIERS, generator=generator)
        best = pool.frontier(domain, lambda x: model.damage(x)[some], centre, pool.PRICES)
        level += [
            best.flatten(0, 1),
            pool.between(domain, best[:, :-1].flatten(0, 1), best[:, 1:].flatten(0, 1)),
            pool.between(domain, best.flatten(0, 1), centre),
        ]
    return level


def _values(problem: Problem, history: Sequence[Observation], good: Sequence[bool]) -> list[float]:
    """The utility of each, the known one where none was measured; of infeasible ones −inf."""
    return [
        problem.utility_of(seen) if feasible else -math.inf
        for seen, feasible in zip(history, good, strict=True)
    ]


def _incumbent(problem: Problem, history: Sequence[Observation], good: Sequence[bool]) -> float:
    """The utility to improve on: that of the best feasible point, at first the baseline's.

    Should not even the baseline be feasible, any feasible point improves: the reference then lies
    below all candidates by their whole range, so that feasibility counts for more than utility.
    """
    found = [value for value in _values(problem, history, good) if value > -math.inf]
    if problem.tolerance >= 0:
        found.append(problem.utility_of(problem.baseline))
    low, high = (float(value) for value in problem.utility.aminmax())
    return max(found, default=low - max(high - low, 1.0))
