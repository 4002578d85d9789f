"""What a proposal is worth: the improvement of the objective, or of the metric in a budget."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from botorch.optim.optimize import optimize_acqf_discrete
from torch import Tensor

from lightning_condensa.search.acquisition import KnownObjectiveCEI
from lightning_condensa.search.budget import log_within
from lightning_condensa.search.feasibility import FeasibilityModel, feasible_ones
from lightning_condensa.search.improvement import MetricImprovement
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.volume import VolumeImprovement

__all__ = ["Criterion", "criterion_of"]


class Criterion(ABC):
    """Values candidates by what is believed after a history; several sets of them, one by one."""

    @abstractmethod
    def merits(self, problem: Problem) -> list[float]:
        """What each of the history is worth; ``-inf`` where it does not count."""

    @abstractmethod
    def values(self, problem: Problem) -> Tensor:
        """The log-value of each of the problem's candidates by itself, shape ``[N]``."""

    @abstractmethod
    def chosen(self, problem: Problem, free: Tensor, q: int) -> list[int]:
        """The ``q`` candidates of greatest joint value among those marked in ``free`` [N]."""


def criterion_of(
    problem: Problem,
    model: FeasibilityModel,
    history: Sequence[Observation],
    pending: Tensor,
    seed: int,
) -> Criterion:
    """The criterion that fits a problem.

    Args:
        problem: The problem; with a budget the metric is to improve, with several utilities the
            hypervolume of the feasible trials, else the utility.
        model: What is believed of the metric.
        history: Finished evaluations.
        pending: Points under evaluation, shape ``[k, d]``.
        seed: Of draws.
    """
    if problem.further is not None:
        return FrontImprovement(problem, model, history, pending, seed)
    if problem.budget is None:
        return FeasibleImprovement(problem, model, history, pending)
    return ImprovementWithin(problem.budget, model, history, pending, seed)


class FeasibleImprovement(Criterion):
    """Improvement of the known utility, where the metric is feasible."""

    def __init__(
        self,
        problem: Problem,
        model: FeasibilityModel,
        history: Sequence[Observation],
        pending: Tensor,
        judge: FeasibilityModel | None = None,
    ) -> None:
        """Judge the history, by ``model`` where there is no other ``judge``."""
        self._model, self._history, self._pending = model, history, pending
        self._good = feasible_ones(problem, history, judge or model)

    def merits(self, problem: Problem) -> list[float]:
        """The utility of each, the known one where none was measured; of infeasible ones −inf."""
        return [
            problem.utility_of(seen) if feasible else -math.inf
            for seen, feasible in zip(self._history, self._good, strict=True)
        ]

    def values(self, problem: Problem) -> Tensor:
        """Log of the constrained expected improvement."""
        found: Tensor = self.acquisition(problem)(problem.candidates.unsqueeze(-2))
        return found

    def chosen(self, problem: Problem, free: Tensor, q: int) -> list[int]:
        """Those of greatest joint acquisition, then those nearest to an improvement."""
        promising = self.promising(problem, free)
        chosen = problem.candidates.new_empty(0, self._pending.shape[-1])
        if bool(promising.any()):
            chosen, _ = optimize_acqf_discrete(
                self.acquisition(problem),
                q=min(q, int(promising.sum())),
                choices=problem.candidates[promising],
                return_acq_values=False,
            )
        best = problem.nearest(chosen).tolist()
        # What cannot improve is only proposed when nothing else is left; those nearest to an
        # improvement are of most use as reserves.
        reserve = problem.utility.masked_fill(~free | promising, -torch.inf)
        return [*best, *reserve.argsort(descending=True).tolist()][:q]

    def promising(self, problem: Problem, free: Tensor) -> Tensor:
        """Which of the candidates marked in ``free`` [N] would improve, if they were feasible."""
        return free & (problem.utility > self._incumbent(problem))

    def acquisition(self, problem: Problem) -> KnownObjectiveCEI:
        """The improvement beside what is pending and may improve itself."""
        incumbent = self._incumbent(problem)
        competing = self._pending[problem.utility_at(self._pending) > incumbent]
        return KnownObjectiveCEI(
            self._model,
            problem.utility_at,
            incumbent,
            X_pending=competing if len(competing) else None,
        )

    def _incumbent(self, problem: Problem) -> float:
        """The utility to improve on: that of the best feasible point, at first the baseline's.

        Should not even the baseline be feasible, any feasible point improves: the reference then
        lies below all candidates by their whole range, so that feasibility counts for more than
        utility.
        """
        found = [value for value in self.merits(problem) if value > -math.inf]
        if problem.tolerance >= 0:
            found.append(problem.utility_of(problem.baseline))
        low, high = (float(value) for value in problem.utility.aminmax())
        return max(found, default=low - max(high - low, 1.0))


class Greedy(Criterion):
    """Chooses one candidate after the other, each with those before it as pending."""

    def __init__(self, pending: Tensor) -> None:
        """Hold what is under evaluation."""
        self._pending = pending

    @abstractmethod
    def beside(self, problem: Problem, pending: Tensor) -> Tensor:
        """The log-value of each candidate by itself, given what is pending; shape ``[N]``."""

    def values(self, problem: Problem) -> Tensor:
        """The log-value of each candidate by itself."""
        return self.beside(problem, self._pending)

    def chosen(self, problem: Problem, free: Tensor, q: int) -> list[int]:
        """The best one, and the best one given that, and so on."""
        free, pending, chosen = free.clone(), self._pending, list[int]()
        for _ in range(q):
            value = self.beside(problem, pending).masked_fill(~free, -torch.inf)
            best = int(value.argmax())
            chosen.append(best)
            free[best] = False
            pending = torch.cat([pending, problem.candidates[best][None]])
        return chosen


class FrontImprovement(Greedy):
    """Improvement of the hypervolume of several known utilities, where the metric is feasible."""

    def __init__(
        self,
        problem: Problem,
        model: FeasibilityModel,
        history: Sequence[Observation],
        pending: Tensor,
        seed: int,
    ) -> None:
        """Judge the history."""
        super().__init__(pending)
        self._volume = VolumeImprovement(problem, model, history, seed)

    def merits(self, problem: Problem) -> list[float]:
        """A weighted sum of each one's utilities, of infeasible ones −inf."""
        return self._volume.merits(problem)

    def beside(self, problem: Problem, pending: Tensor) -> Tensor:
        """Log of the expected improvement of the hypervolume."""
        return self._volume(problem, pending)


class ImprovementWithin(Greedy):
    """Improvement of the metric, where the known utility keeps a budget."""

    def __init__(
        self,
        budget: float,
        model: FeasibilityModel,
        history: Sequence[Observation],
        pending: Tensor,
        seed: int,
    ) -> None:
        """Find what is to be beaten."""
        super().__init__(pending)
        self._model, self._history, self._seed = model, history, seed
        self._kept = [
            s.metric is not None and s.utility is not None and s.utility >= budget for s in history
        ]

    def merits(self, problem: Problem) -> list[float]:
        """The metric of each; of those that exceeded the budget or have none −inf."""
        return [
            seen.metric if kept and seen.metric is not None else -math.inf
            for seen, kept in zip(self._history, self._kept, strict=True)
        ]

    def beside(self, problem: Problem, pending: Tensor) -> Tensor:
        """Log of the expected improvement, times the probability of keeping the budget."""
        beaten = [s for s, kept in zip(self._history, self._kept, strict=True) if kept]
        improvement = MetricImprovement(self._model, beaten, pending, self._seed)
        return improvement(problem.candidates) + log_within(problem, self._history)
