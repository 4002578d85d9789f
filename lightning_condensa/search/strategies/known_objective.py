"""The default: the objective is known, only feasibility is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from botorch.optim.optimize import optimize_acqf_discrete
from torch import Tensor

from lightning_condensa.search.acquisition import KnownObjectiveCEI
from lightning_condensa.search.feasibility import FeasibilityModel
from lightning_condensa.search.problem import Observation, Problem, best_feasible
from lightning_condensa.search.strategies.base import Strategy
from lightning_condensa.search.surrogates import BilogGP, CliffEnsemble

__all__ = ["KnownObjectiveStrategy"]


class KnownObjectiveStrategy(Strategy):
    """Constrained expected improvement of the known objective, for any number of coordinates.

    The surrogate is the `CliffEnsemble` where the problem says that its curves apply, otherwise
    the `BilogGP`.

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
        model = CliffEnsemble if problem.cliff else BilogGP
        return model(problem, history, seed)

    def _select(
        self,
        problem: Problem,
        history: Sequence[Observation],
        pending: Tensor,
        free: Tensor,
        q: int,
        seed: int,
    ) -> list[int]:
        incumbent = _incumbent(problem, history)
        promising = free & (problem.utility > incumbent)
        chosen = problem.candidates.new_empty(0, pending.shape[-1])
        if bool(promising.any()):
            competing = pending[problem.utility_at(pending) > incumbent]
            acquisition = KnownObjectiveCEI(
                self.surrogate(problem, history, seed),
                problem.utility_at,
                incumbent,
                X_pending=competing if len(competing) else None,
            )
            chosen, _ = optimize_acqf_discrete(
                acquisition,
                q=min(q, int(promising.sum())),
                choices=problem.candidates[promising],
                return_acq_values=False,
            )
        best = problem.nearest(chosen).tolist()
        # What cannot improve is only proposed when nothing else is left; those nearest to an
        # improvement are of most use as reserves.
        reserve = problem.utility.masked_fill(~free | promising, -torch.inf)
        return [*best, *reserve.argsort(descending=True).tolist()][:q]


def _incumbent(problem: Problem, history: Sequence[Observation]) -> float:
    """The utility to improve on: that of the best feasible point, at first the baseline's.

    Should not even the baseline be feasible, any feasible point improves: the reference then lies
    below all candidates by their whole range, so that feasibility counts for more than utility.
    """
    known = [replace(seen, utility=problem.utility_of(seen)) for seen in history]
    best = best_feasible(known, problem.level, problem.z)
    found = [] if best is None else [problem.utility_of(known[best])]
    if problem.tolerance >= 0:
        found.append(problem.utility_of(problem.baseline))
    low, high = (float(value) for value in problem.utility.aminmax())
    return max(found, default=low - max(high - low, 1.0))
