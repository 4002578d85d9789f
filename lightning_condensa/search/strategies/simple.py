"""Strategies without a model: bisection, random and grid search, the baselines to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.strategies.base import (
    Strategy,
    require_level,
    require_one_coordinate,
)

__all__ = ["BisectionStrategy", "GridStrategy", "RandomStrategy"]


class BisectionStrategy(Strategy):
    """Halve the bracket between the farthest feasible and the nearest infeasible point.

    For one coordinate along which the metric falls, such as ``u = -ln(density)``. Points under
    evaluation split the bracket too, so that a batch divides it evenly. Ties and noise need no
    care: only evaluated points are ever chosen from.

    Example:
        >>> u = torch.linspace(0.0, 4.0, 5, dtype=torch.float64)
        >>> dense = Observation(torch.zeros(1), metric=0.98, variance=1e-6, utility=0.0)
        >>> problem = Problem(u[:, None], u, dense, level=0.97, noise_variance=1e-6, cliff=True)
        >>> BisectionStrategy().propose(problem, [], None, q=1, seed=0)
        [2]
    """

    def _select(
        self,
        problem: Problem,
        history: Sequence[Observation],
        pending: Tensor,
        free: Tensor,
        q: int,
        seed: int,
    ) -> list[int]:
        require_level(problem, "bisection")
        u = require_one_coordinate(problem, "bisection")
        good = [float(o.point[0]) for o in history if o.feasible(problem.level, problem.z)]
        low = max([float(problem.baseline.point[0]), *good])
        beyond = [
            at
            for o in history
            if (at := float(o.point[0])) > low and not o.feasible(problem.level, problem.z)
        ]
        high = min(beyond, default=max(float(u.max()), low))
        free = free.clone()
        splits = [at for at in pending[:, 0].tolist() if low < at < high]
        chosen: list[int] = []
        for _ in range(q):
            edges = torch.tensor(sorted([low, *splits, high]), dtype=torch.float64)
            widest = int(edges.diff().argmax())
            middle = (edges[widest] + edges[widest + 1]) / 2
            index = int((u - middle).abs().masked_fill(~free, torch.inf).argmin())
            chosen.append(index)
            free[index] = False
            splits.append(float(u[index].clamp(low, high)))
        return chosen


class RandomStrategy(Strategy):
    """Uniform over the candidates not yet evaluated."""

    def _select(
        self,
        problem: Problem,
        history: Sequence[Observation],
        pending: Tensor,
        free: Tensor,
        q: int,
        seed: int,
    ) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(int(free.sum()), generator=generator)[:q]
        return [int(index) for index in torch.nonzero(free).squeeze(-1)[order]]


class GridStrategy(Strategy):
    """An even grid over the coordinates, snapped to candidates; then the largest holes.

    Args:
        points: Points of the grid in all; with ``d`` coordinates the next ``d``-th power.

    Raises:
        ValueError: If ``points < 2``.
    """

    def __init__(self, points: int = 10) -> None:
        """Hold the size of the grid."""
        if points < 2:
            raise ValueError(f"points must be at least 2, got {points}")
        self.points = points

    def _select(
        self,
        problem: Problem,
        history: Sequence[Observation],
        pending: Tensor,
        free: Tensor,
        q: int,
        seed: int,
    ) -> list[int]:
        d = problem.candidates.shape[-1]
        low, high = problem.candidates.aminmax(dim=0)
        unit = (problem.candidates - low) / (high - low).clamp(min=1e-12)
        axis = torch.linspace(0, 1, math.ceil(round(self.points ** (1 / d), 9)), dtype=unit.dtype)
        grid = torch.stack(torch.meshgrid(*[axis] * d, indexing="ij"), dim=-1).reshape(-1, d)
        free = free.clone()
        chosen: list[int] = []
        for index in torch.cdist(grid, unit).argmin(dim=-1).tolist():
            if free[index] and len(chosen) < q:
                chosen.append(index)
                free[index] = False
        while len(chosen) < q:
            holes = torch.cdist(unit, unit[~free]).amin(dim=-1).masked_fill(~free, -torch.inf)
            index = int(holes.argmax())
            chosen.append(index)
            free[index] = False
        return chosen
