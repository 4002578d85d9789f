"""Candidates for a search in several dimensions: combinations of levels worth a look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_condensa.search.domain import Domain

__all__ = ["around", "between", "frontier", "neighbours", "trust_region"]

#: Utility that a unit of damage costs; a point of accuracy is 0.01 of damage.
PRICES = (8.0, 20.0, 45.0, 90.0, 180.0, 400.0, 1000.0, 4000.0)
#: In a budget more may have to be lost than any tolerance would allow.
BUDGET_PRICES = (0.3, 0.7, 1.5, 3.0, *PRICES)
_SWEEPS = 3


def frontier(
    domain: Domain, damage: Callable[[Tensor], Tensor], start: Tensor, prices: Sequence[float]
) -> Tensor:
    """Combinations of greatest ``utility - price * damage``, for each model and price.

    These are the Lagrangian solutions of "greatest utility within a budget of damage". Each is
    climbed to along one axis at a time, over all its levels; damages are taken to add up.

    Args:
        domain: The levels.
        damage: Damage that ``S`` models see at points ``[n, d]``, shape ``[S, n]``.
        start: Where to begin, shape ``[A]``.
        prices: Prices of a unit of damage, ``K`` of them.

    Returns:
        Combinations, shape ``[S, K, A]``.
    """
    base = torch.zeros(len(domain.axes), dtype=torch.int64)
    tables = []
    for axis, size in enumerate(domain.sizes.tolist()):
        alone = base.repeat(size, 1)
        alone[:, axis] = torch.arange(size)
        seen = damage(domain.points(alone))
        tables.append(seen - seen[:, :1])
    price = torch.tensor(list(prices), dtype=torch.float64)
    level = start.repeat(len(tables[0]), len(price), 1)
    for _ in range(_SWEEPS):
        before = level.clone()
        for axis, table in enumerate(tables):
            size = table.shape[1]
            along = level.unsqueeze(-2).repeat(1, 1, size, 1)
            along[..., axis] = torch.arange(size)
            worth = domain.utility(along.flatten(0, 2)).view(along.shape[:-1])
            score = worth - price[:, None] * table[:, None, :]
            level[..., axis] = score.argmax(dim=-1)
        if torch.equal(level, before):
            break
    return level


def between(domain: Domain, first: Tensor, second: Tensor) -> Tensor:
    """Combinations a quarter, half and three quarters of the way; shapes ``[M, A]``, ``[3M, A]``.

    A choice changes sides halfway, a range moves level by level.
    """
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)[:, None, None]
    mixed = first + shares * (second - first)
    return mixed.round().long().flatten(0, 1)


def neighbours(domain: Domain, level: Tensor) -> Tensor:
    """Combinations one, two or four levels away along one axis; ``[M, A]`` -> ``[6 M A, A]``."""
    count = level.shape[1]
    steps = torch.tensor([-4, -2, -1, 1, 2, 4])
    change = torch.einsum("s,ab->sab", steps, torch.eye(count, dtype=torch.int64)).flatten(0, 1)
    moved = (level[:, None, :] + change).flatten(0, 1)
    return torch.minimum(moved.clamp(min=0), domain.sizes - 1)


def around(
    domain: Domain, centre: Tensor, length: float, count: int, generator: torch.Generator
) -> Tensor:
    """Combinations in a box around ``centre`` [A] that differ from it in a few axes.

    Args:
        domain: The levels.
        centre: The middle.
        length: Side of the box as a share of each axis.
        count: How many, shape ``[count, A]``.
        generator: Source of the draws.
    """
    axes = len(centre)
    reach = (0.5 * length * (domain.sizes - 1)).clamp(min=1)
    draws = 2 * torch.rand(count, axes, generator=generator, dtype=torch.float64) - 1
    some = torch.rand(count, axes, generator=generator) < min(1.0, 4 / axes)
    some[torch.arange(count), torch.randint(axes, (count,), generator=generator)] = True
    moved = centre + torch.where(some, draws * reach, 0.0).round().long()
    return torch.minimum(moved.clamp(min=0), domain.sizes - 1)


def trust_region(values: Iterable[float], dimensions: int) -> float:
    """Side of the trust region after a history: longer on a streak of successes, else shorter.

    As in TuRBO and SCBO (Eriksson and Poloczek, 2021), replayed from the start so that nothing
    has to be stored: from 0.8 it doubles after three successes in a row, up to 1.6, and halves
    after as many failures as there are dimensions (at least four); below 1/128 it starts anew.

    Args:
        values: Of finished evaluations in order: what is to grow, such as the utility of a feasible
            point and ``-inf`` of others.
        dimensions: Number of dimensions.
    """
    length, best, successes, failures = 0.8, float("-inf"), 0, 0
    for value in values:
        better = value > best
        best = max(best, value)
        successes, failures = (successes + 1, 0) if better else (0, failures + 1)
        if successes == 3:
            length, successes = min(2 * length, 1.6), 0
        elif failures == max(4, dimensions):
            length, failures = length / 2, 0
        if length < 1 / 128:
            length = 0.8
    return length
