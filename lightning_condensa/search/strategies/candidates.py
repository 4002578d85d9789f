"""Candidates in several dimensions: what a surrogate finds worth a look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_condensa.search import pool
from lightning_condensa.search.budget import possible
from lightning_condensa.search.domain import Domain, distinct
from lightning_condensa.search.ensemble import DamageMixture
from lightning_condensa.search.feasibility import FeasibilityModel
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.strategies.base import occupied
from lightning_condensa.search.strategies.criteria import Criterion

__all__ = ["with_candidates"]

#: Evaluations with one strength for all before the groups may differ; in a budget the first one
#: is the best of them by all that is known.
_TOGETHER, _TOGETHER_WITHIN = 3, 1
#: Models of an ensemble whose frontiers become candidates.
_FRONTIERS = 24
_AROUND = 384
_RANDOM = 128
#: Rounds of a climb from the best candidates, and from how many.
_ROUNDS = 2
_CLIMBERS = 12
#: Candidates whose objective is looked up where it is slow.
_EXACT = 12


def with_candidates(
    problem: Problem,
    domain: Domain,
    model: FeasibilityModel,
    history: Sequence[Observation],
    criterion: Criterion,
    pending: Tensor,
    seed: int,
) -> Problem:
    """The problem with candidates that this model finds worth a look."""
    points = torch.cat([pending, *(seen.point[None] for seen in history)])
    taken = domain.nearest(points)
    together = _TOGETHER if problem.budget is None else _TOGETHER_WITHIN
    if len(taken) < together:
        local = _restricted(problem, domain, torch.cat([domain.diagonals(), taken]))
    else:
        level = torch.cat([*_combinations(problem, domain, model, history, criterion, seed), taken])
        local = _restricted(problem, domain, level)
        for _ in range(_ROUNDS):
            best = _best(local, criterion, points, _CLIMBERS)
            level = torch.cat([domain.nearest(local.candidates), pool.neighbours(domain, best)])
            local = _restricted(problem, domain, level)
    exact = domain.all_exact()
    if exact is None:
        return local
    # Few enough to ask the objective itself.
    level = torch.cat([_best(local, criterion, points, _EXACT), taken])
    return _restricted(problem, exact, level)


def _restricted(problem: Problem, domain: Domain, level: Tensor) -> Problem:
    """The problem with these combinations as its candidates."""
    level = distinct(level)
    known = domain.utilities(level)
    return replace(
        problem,
        candidates=domain.points(level),
        utility=known[:, 0],
        domain=domain,
        further=known[:, 1:] if domain.further else None,
    )


def _best(problem: Problem, criterion: Criterion, taken: Tensor, count: int) -> Tensor:
    """The combinations of greatest value among the candidates that are not taken."""
    assert problem.domain is not None
    value = criterion.values(problem)
    value = value.masked_fill(occupied(problem.candidates, taken), -torch.inf)
    best = value.topk(min(count, len(value))).indices
    return problem.domain.nearest(problem.candidates[best])


def _combinations(
    problem: Problem,
    domain: Domain,
    model: FeasibilityModel,
    history: Sequence[Observation],
    criterion: Criterion,
    seed: int,
) -> list[Tensor]:
    """Frontiers of the model's members, what lies between them and the incumbent, and more."""
    generator = torch.Generator().manual_seed(seed)
    value = criterion.merits(problem)
    diagonals = domain.diagonals()
    centre = _centre(problem, domain, history, value)
    length = pool.trust_region(value, len(domain.axes))
    level = [
        diagonals,
        domain.random(_RANDOM, seed),
        pool.around(domain, centre, length, _AROUND, generator),
        pool.around(domain, centre, length / 4, _AROUND, generator),
    ]
    if isinstance(model, DamageMixture):
        some = torch.multinomial(model.log_weights.exp(), _FRONTIERS, generator=generator)
        prices = pool.PRICES if problem.budget is None else pool.BUDGET_PRICES
        views = _views(domain)
        for view, members in zip(views, some.chunk(len(views)), strict=True):
            best = _frontier(view, model, members, centre, prices)
            level += [
                best.flatten(0, 1),
                pool.between(domain, best[:, :-1].flatten(0, 1), best[:, 1:].flatten(0, 1)),
                pool.between(domain, best.flatten(0, 1), centre),
            ]
    return level


def _views(domain: Domain) -> list[Domain]:
    """The domain under each of its objectives, and under their mean."""
    if not domain.further:
        return [domain]
    mean = Domain(domain.axes, lambda level: domain.utilities(level).mean(dim=-1))
    return [mean, replace(domain, further=()), *domain.further]


def _frontier(
    domain: Domain, model: DamageMixture, members: Tensor, start: Tensor, prices: Sequence[float]
) -> Tensor:
    return pool.frontier(domain, lambda x: model.damage(x)[members], start, prices)


def _centre(
    problem: Problem, domain: Domain, history: Sequence[Observation], value: Sequence[float]
) -> Tensor:
    """The best combination so far, shape ``[A]``; the mildest possible one where there is none."""
    best = max(range(len(history)), key=value.__getitem__, default=None)
    if best is not None and value[best] > float("-inf"):
        return domain.nearest(history[best].point[None])[0]
    local = _restricted(problem, domain, domain.diagonals())
    mild = local.utility.masked_fill(~possible(local, history), torch.inf).argmin()
    if problem.budget is None or not bool(possible(local, history).any()):
        return domain.diagonals()[0]
    return domain.nearest(local.candidates[mild][None])[0]
