"""The default: the objective is known, only feasibility is learned."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_condensa.search.budget import challenged
from lightning_condensa.search.ensemble import DamageMixture
from lightning_condensa.search.feasibility import FeasibilityModel
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.strategies.base import Strategy
from lightning_condensa.search.strategies.candidates import with_candidates
from lightning_condensa.search.strategies.criteria import criterion_of
from lightning_condensa.search.strategies.foresight import cheap_or_full
from lightning_condensa.search.surrogates import BilogGP, CliffEnsemble

__all__ = ["KnownObjectiveStrategy"]

#: Evaluations up to which damages that add up explain more than a process without a form.
_ENSEMBLE_UP_TO = 40


class KnownObjectiveStrategy(Strategy):
    """Constrained expected improvement of the known objective, for any number of coordinates.

    The surrogate is the `CliffEnsemble` where the problem says that its curves apply. With a
    domain of several dimensions and an accuracy it is the `DamageMixture`; candidates are then the
    frontiers of its members, points between these and the incumbent, around it, and everywhere.
    For other metrics, and beyond 40 evaluations, it is the `BilogGP` in a trust region.

    In a problem with a budget the same surrogates give the expected improvement of the metric, of
    candidates that keep the budget (`MetricImprovement`).

    Example:
        >>> import torch
        >>> from lightning_condensa.search import Observation, Problem
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
        problem = challenged(problem, history)
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
        criterion = criterion_of(problem, model, history, pending, seed)
        local = with_candidates(problem, problem.domain, model, history, criterion, pending, seed)
        _, free = self._checked(local, history, pending, q)
        q = min(q, int(free.sum()))
        return local.candidates[criterion.chosen(local, free, q)]

    def _select(
        self,
        problem: Problem,
        history: Sequence[Observation],
        pending: Tensor,
        free: Tensor,
        q: int,
        seed: int,
    ) -> list[int]:
        if problem.fidelity:
            return cheap_or_full(problem, history, pending, free, q, seed)
        model = self.surrogate(problem, history, seed)
        return criterion_of(problem, model, history, pending, seed).chosen(problem, free, q)
