"""A search in the terms of its strategy: candidates, utilities, a level, observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_condensa.objectives import Objective
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.result import Baseline
from lightning_condensa.search.space import SearchSpace
from lightning_condensa.search.strategies import Strategy
from lightning_condensa.search.trial import Mode
from lightning_condensa.search.utility import Utility, known_objective, utilities

#: Constraint of a diverged trial: infeasible by far, and finite, which the dashboard needs.
DIVERGED_VIOLATION = 1e6


class Formulation:
    """Translates between values of a scheme and points of a :class:`Problem`.

    Args:
        space: The scheme's open dimensions.
        objective: What is optimized.
        model: The uncompressed model.
        baseline: Its figures.
        mode: Direction of the metric.
        tolerance: How far the metric may be from the baseline's.
        z: Margin in standard deviations of the metric's noise.

    Attributes:
        candidates: The values that can be proposed.
        points: Their coordinates, float64 of shape ``(N, d)``.
        known: Their objective.
        problem: What the strategy is told.
    """

    def __init__(
        self,
        space: SearchSpace,
        objective: Objective,
        model: pl.LightningModule,
        baseline: Baseline,
        mode: Mode,
        tolerance: float,
        z: float,
    ) -> None:
        self.space, self.baseline = space, baseline
        self.sign = 1.0 if mode == "max" else -1.0
        self.level = baseline.metric - self.sign * tolerance
        self.candidates = space.candidates(model)
        self.points = torch.stack([space.coordinates(v) for v in self.candidates])
        self.known = known_objective(objective, space, model, self.candidates)
        self.utility = Utility(objective, [*self.known, baseline.objective])
        self.problem = Problem(
            candidates=self.points,
            utility=utilities(self.utility, self.known),
            baseline=Observation(
                space.dense_point(),
                metric=self.sign * baseline.metric,
                variance=baseline.variance,
                utility=self.utility(baseline.objective),
            ),
            level=self.sign * self.level,
            noise_variance=baseline.variance,
            cliff=space.is_density and mode == "max" and 0 < baseline.metric <= 1,
            z=z,
        )

    @property
    def target(self) -> float:
        """The metric that a trial must show."""
        return self.sign * self.problem.target

    def observation(
        self, values: Mapping[str, Any], metric: float | None, objective: float | None
    ) -> Observation:
        """A finished evaluation; a diverged one where there is no metric."""
        return Observation(
            self.space.coordinates(dict(values)),
            metric=None if metric is None else self.sign * metric,
            variance=self.baseline.variance,
            utility=None if objective is None else self.utility(objective),
            diverged=metric is None,
        )

    def violation(self, metric: float | None) -> float:
        """How far a metric misses the target; at most 0 where it is feasible."""
        if metric is None:
            return DIVERGED_VIOLATION
        return self.problem.target - self.sign * metric

    def objective_at(self, values: Mapping[str, Any]) -> float:
        """The known objective of the nearest candidate."""
        point: Tensor = self.space.coordinates(dict(values))
        return self.known[int(self.problem.nearest(point[None]))]

    def propose(
        self,
        strategy: Strategy,
        history: Sequence[Observation],
        taken: Sequence[Mapping[str, Any]],
        seed: int,
    ) -> dict[str, Any] | None:
        """The next values to try; ``None`` where every candidate is finished or taken.

        Args:
            strategy: Chooses.
            history: What has been seen.
            taken: Values under evaluation, and others that must not be proposed.
            seed: Of the choice.
        """
        points = [self.space.coordinates(dict(values)) for values in taken]
        pending = torch.stack(points) if points else None
        proposed = strategy.propose(self.problem, history, pending, q=1, seed=seed)
        return self.candidates[proposed[0]] if proposed else None
