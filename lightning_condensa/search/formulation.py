"""A search in the terms of its strategy: candidates, utilities, a level, observations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_condensa.objectives import Objective, Several
from lightning_condensa.search.budget import possible
from lightning_condensa.search.feasibility import enough
from lightning_condensa.search.fidelity import Proposal
from lightning_condensa.search.goal import Goal
from lightning_condensa.search.landscape import Landscape
from lightning_condensa.search.noise import Noise
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.sensitivity import Sensitivity
from lightning_condensa.search.space import SearchSpace
from lightning_condensa.search.store import Record
from lightning_condensa.search.strategies import Strategy
from lightning_condensa.search.trial import TrialOutcome
from lightning_condensa.search.trials import Baseline

#: Constraint of a diverged trial: infeasible by far, and finite, which the dashboard needs.
DIVERGED_VIOLATION = 1e6
#: Relative gain of the objective below which a search is in vain.
_GAIN = 0.01


class Formulation:
    """Translates between values of a scheme and points of a :class:`Problem`.

    Args:
        space: The scheme's open dimensions.
        objective: What is optimized.
        model: The uncompressed model.
        baseline: Its figures.
        goal: What is asked for.
        z: Margin in standard deviations of the metric's noise.
        share: Of the training, that a trial may take instead of all of it; points have theirs as
            last coordinate where it is less than 1.

    Attributes:
        objective: What is optimized, told of the uncompressed model.
        candidates: The values that can be proposed.
        points: Their coordinates, float64 of shape ``(N, d)``.
        landscape: Their objective, and that of every other point.
        level: The metric to keep; ``None`` where there is a budget.
        problem: What the strategy is told.

    Raises:
        ValueError: If no candidate keeps the budget, or a share is of no use.
    """

    def __init__(
        self,
        space: SearchSpace,
        objective: Objective,
        model: pl.LightningModule,
        baseline: Baseline,
        goal: Goal,
        z: float,
        share: float = 1.0,
    ) -> None:
        self.space, self.baseline, self.goal = space, baseline, goal
        self.sign = goal.sign
        self.level = goal.level(baseline.metric)
        self.small = goal.small(baseline.metric)
        self.objective = told = objective.beside(model, baseline.objectives)
        parts = told.parts if isinstance(told, Several) else (told,)
        first, dense = parts[0], baseline.objective
        self.landscape = Landscape(first, space, model, dense, goal.budget)
        self._others = {
            part.name: Landscape(
                part, space, model, baseline.objectives[part.name], like=self.landscape
            )
            for part in parts[1:]
        }
        self.candidates, self.points = self.landscape.candidates, self.landscape.points
        self.utility = self.landscape.utility
        further = [other.utilities for other in self._others.values()]
        domain = self.landscape.domain
        if domain is not None and further:
            others = [other.domain for other in self._others.values()]
            domain = replace(domain, further=tuple(o for o in others if o is not None))
        accurate = goal.mode == "max" and 0 < baseline.metric <= 1
        self.problem = Problem(
            candidates=self.points,
            utility=self.landscape.utilities,
            baseline=Observation(
                space.dense_point(),
                metric=self.sign * baseline.metric,
                variance=baseline.variance,
                utility=self.utility(baseline.objective),
                further=self._further(baseline.objectives),
            ),
            level=self.sign * baseline.metric - self.small,
            noise_variance=baseline.variance,
            cliff=space.is_density and accurate,
            z=z,
            domain=domain,
            accuracy=domain is not None and accurate,
            further=torch.stack(further, dim=-1) if further else None,
            budget=None if goal.budget is None else self.utility(goal.budget),
        )
        if share < 1:
            if not self.problem.cliff or self.problem.budget is not None or further:
                raise ValueError(
                    "fidelity < 1 is for searches of one density with one objective and a "
                    "tolerance of a metric like an accuracy, of which more is better and the dense "
                    f"model has between 0 and 1; got {len(space.dimensions)} dimension(s), a "
                    f"{goal} and a dense metric of {baseline.metric:.4g}"
                )
            self.problem = self.problem.with_share(share)
        if not bool(possible(self.problem, []).any()):
            nearest = self.landscape.known[int(self.problem.utility.argmax())]
            raise ValueError(
                f"budget={goal.budget!r} is out of reach: the {objective.name} that this scheme "
                f"comes nearest with is {nearest:.6g} {objective.unit}"
            )
        if goal.budget is None:
            self._warn_of_no_gain()

    def _warn_of_no_gain(self) -> None:
        """Say before any training where none can help."""
        gain = self.problem.utility.max() - self.utility(self.baseline.objective)
        if float(gain) < _GAIN:
            name = self.landscape.measure.objective.name
            warnings.warn(
                f"no value of the scheme makes the {name} more than {_GAIN:.0%} better than that "
                "of the uncompressed model: does it depend on what the scheme changes?",
                UserWarning,
                stacklevel=2,
            )

    @property
    def scannable(self) -> bool:
        """Whether the strategy has a use for a scan of the dimensions."""
        return self.problem.accuracy or self.problem.cliff

    def use(self, sensitivity: Sensitivity) -> None:
        """Tell the strategy of a scan."""
        loss = max(2 * self.small, 0.02)
        if self.problem.cliff:  # its curves begin at the dense model, wherever the range does
            sensitivity = replace(sensitivity, reference=self.baseline.metric)
        self.problem = replace(self.problem, scan=sensitivity.prior(self.space, loss, self.sign))

    def expecting(self, history: Sequence[Observation]) -> Problem:
        """The problem, with the noise seen nearest to the level for that of the next trial."""
        seen = [
            (abs(s.metric - self.problem.level), s.variance)
            for s in history
            if s.metric is not None
        ]
        return replace(self.problem, noise_variance=min(seen)[1]) if seen else self.problem

    def target(self, history: Sequence[Observation]) -> float | None:
        """The metric that the next trial must show; ``None`` where there is a budget."""
        if self.level is None:
            return None
        return self.sign * self.expecting(history).target

    def observation(
        self,
        values: Mapping[str, Any],
        metric: float | None,
        objective: float | None,
        variance: float | None = None,
        objectives: Mapping[str, float] | None = None,
        fidelity: float = 1.0,
    ) -> Observation:
        """A finished evaluation; a diverged one where there is no metric."""
        return Observation(
            self._point(values, fidelity),
            metric=None if metric is None else self.sign * metric,
            variance=self.baseline.variance if variance is None else variance,
            utility=None if objective is None else self.utility(objective),
            diverged=metric is None,
            further=self._further(objectives or {}),
        )

    def takes(self, fidelity: float) -> bool:
        """Whether the strategy can be told of a trial with a share of the training."""
        return fidelity == 1 or self.problem.fidelity

    def _point(self, values: Mapping[str, Any], fidelity: float) -> Tensor:
        point = self.space.coordinates(dict(values))
        return torch.cat([point, point.new_tensor([fidelity])]) if self.problem.fidelity else point

    def named(self, objective: float | None) -> dict[str, float]:
        """The one objective of a search by its name; nothing where there are several or none."""
        if objective is None or self._others:
            return {}
        return {self.landscape.measure.objective.name: objective}

    def _further(self, objectives: Mapping[str, float]) -> tuple[float, ...]:
        """Utilities under the further objectives; none where they were not measured."""
        if not all(name in objectives for name in self._others):
            return ()
        return tuple(other.utility(objectives[name]) for name, other in self._others.items())

    def seen(self, record: Record, runs: Sequence[Record] = ()) -> Observation:
        """A trial that ended, and did not fail.

        Args:
            record: The trial.
            runs: Further runs of it. The mean counts; its noise is that of one run, as all are
                validated on the same samples. A run that diverged is no good.
        """
        outcome = record.outcome
        own = self.noise_of(record).variance
        if outcome.bound is not None and not self._redeemed(outcome, own):
            return Observation(
                self._point(record.values, record.fidelity),
                metric=None,
                variance=own,
                utility=None if outcome.objective is None else self.utility(outcome.objective),
                bound=self.sign * outcome.bound,
            )
        every = [record, *runs]
        metrics = [r.outcome.metric for r in every if r.outcome.metric is not None]
        metric = fmean(metrics) if len(metrics) == len(every) else None
        variance = fmean(self.noise_of(r).variance for r in every)
        return self.observation(
            record.values,
            metric,
            outcome.objective,
            variance,
            outcome.objectives,
            record.fidelity,
        )

    def noise_of(self, record: Record) -> Noise:
        """The noise of a trial's metric: its own where it was paired, unless one is given now."""
        paired = record.basis == "paired" and self.baseline.basis != "given"
        return Noise(record.variance, "paired") if paired else self.baseline.noise

    def _redeemed(self, outcome: TrialOutcome, variance: float) -> bool:
        """Whether an aborted trial keeps the level that the search has now."""
        return self.level is not None and self.violation(outcome.metric, None, variance) <= 0

    def feasible(self, outcome: TrialOutcome, seen: Observation, probability: float | None) -> bool:
        """Whether a trial counts as feasible.

        Args:
            outcome: The trial's.
            seen: What all its runs have shown.
            probability: That its model truly keeps the level, where that has been judged.
        """
        if self.level is None:
            return seen.metric is not None and self.goal.within(outcome.objective)
        return enough(self.problem, seen, probability)

    def violation(
        self, metric: float | None, objective: float | None, variance: float | None = None
    ) -> float:
        """How far a trial misses what is asked for; at most 0 where it is feasible.

        With a budget, by which share of it (in its logarithm) the objective is off.

        Args:
            metric: Its metric; ``None`` where it diverged.
            objective: Its objective.
            variance: Of the metric; that of the baseline where ``None``.
        """
        if metric is None:
            return DIVERGED_VIOLATION
        if self.problem.budget is not None:
            if objective is None:
                return DIVERGED_VIOLATION
            return self.problem.budget - self.utility(objective)
        variance = self.baseline.variance if variance is None else variance
        return self.problem.level + self.problem.z * math.sqrt(variance) - self.sign * metric

    def objective_at(self, values: Mapping[str, Any]) -> float:
        """The known objective at some values."""
        return self.landscape.measure(dict(values))

    def propose(
        self,
        strategy: Strategy,
        history: Sequence[Observation],
        taken: Sequence[Proposal],
        seed: int,
        trainings: float = 1.0,
    ) -> Proposal | None:
        """What to try next; ``None`` where every candidate is finished or taken.

        Args:
            strategy: Chooses.
            history: What has been seen.
            taken: What is under evaluation, and others that must not be proposed.
            seed: Of the choice.
            trainings: How many are left, at least one.
        """
        points = [self._point(o.values, o.fidelity) for o in taken if self.takes(o.fidelity)]
        pending = torch.stack(points) if points else None
        problem = self.expecting(history).affordable(trainings)
        proposed = strategy.suggest(problem, history, pending, q=1, seed=seed)
        if not len(proposed):
            return None
        fidelity = float(proposed[0, -1]) if problem.fidelity else 1.0
        return Proposal(self.landscape.values(proposed[0, : self.points.shape[1]]), fidelity)
