"""All of the training, or first a share of it: what either lets the next full trial gain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_condensa.search.acquisition import KnownObjectiveCEI
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.strategies.criteria import FeasibleImprovement
from lightning_condensa.search.surrogates import CliffEnsemble

__all__ = ["Foresight", "cheap_or_full"]

#: Losses, in tolerances, between which outcomes of a trial are told apart.
_LOSSES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0)
#: Cheap and next full trials that are considered; neighbours on a fine grid are nearly the same.
_CHEAP, _NEXT = 32, 64


def cheap_or_full(
    problem: Problem,
    history: Sequence[Observation],
    pending: Tensor,
    free: Tensor,
    q: int,
    seed: int,
) -> list[int]:
    """Choose full trials by their improvement, and a cheap one before them where that pays.

    Only full trials can win, so a cheap one is worth what it lets the next full one gain. Where
    that is more for its cost than what the full trial in question lets the one after it gain, the
    cheap one goes first (:class:`Foresight`). One at a time: a second one, asked before the first
    has answered, would ask nearly the same.

    Args:
        problem: With ``fidelity=True``.
        history: Finished evaluations.
        pending: Points under evaluation, shape ``[k, 2]``.
        free: Which candidates may be proposed, shape ``[N]``.
        q: How many.
        seed: Of the surrogate.

    Returns:
        Indices of candidates; fewer than ``q`` where few full ones are left.
    """
    model = CliffEnsemble(problem, history, seed)
    done = [seen for seen in history if seen.point[-1] == 1]
    # What counts as feasible rests on full trials alone.
    judge = CliffEnsemble(problem, done, seed) if problem.z > 0 else model
    whole = problem.cost == 1
    full, left = problem.only(whole), free[whole]
    running = pending[pending[:, -1] == 1]
    criterion = FeasibleImprovement(full, model, done, running, judge)
    chosen = criterion.chosen(full, left, min(q, int(left.sum())))
    indices = torch.nonzero(whole).flatten()[chosen].tolist()
    cheap = _some(torch.nonzero(free & ~whole).flatten(), _CHEAP)
    able = torch.nonzero(criterion.promising(full, left)).flatten()
    if len(running) < len(pending) or not len(cheap) or not len(able):
        return indices
    first = full.candidates[chosen[:1]]
    following = torch.cat([first, full.candidates[_some(able, _NEXT)]])
    foresight = Foresight(problem, model, criterion.acquisition(full), following)
    rate = foresight.after(problem.candidates[cheap]) / problem.cost[cheap]
    if rate.max() <= foresight.after_full(first):
        return indices
    return [int(cheap[rate.argmax()]), *indices][:q]


def _some(indices: Tensor, count: int) -> Tensor:
    """At most ``count`` of them, evenly spaced."""
    kept = torch.linspace(0, len(indices) - 1, min(len(indices), count)).round().long()
    return indices[kept]


class Foresight:
    r"""How much the next full trial can be expected to gain, once another trial has ended.

    With ``w_m I_m(j)`` the part of the surrogate's member ``m`` in the expected improvement by a
    full trial ``j``, and outcomes ``y`` of the other trial ``i`` told apart by the interval in
    which the metric falls,

    .. math::
        V(i) = \sum_y \max_j \sum_m P_m(y \mid i) \, w_m I_m(j).

    What a cheap trial adds is ``V(i) - max_j I(j)``, the expected value of sample information
    (Raiffa and Schlaifer, Applied Statistical Decision Theory, 1961), to be compared per cost
    (Poloczek, Wang and Frazier, Multi-Information Source Optimization, 2017). A full trial has its
    own improvement besides, and where it turns out feasible the next one has to improve on it.

    Args:
        problem: The problem.
        model: What is believed of the metric.
        acquisition: The improvement by full trials, beside what is pending.
        following: Full trials that may be the next, shape ``[j, 2]``, the best one among them.
    """

    def __init__(
        self,
        problem: Problem,
        model: CliffEnsemble,
        acquisition: KnownObjectiveCEI,
        following: Tensor,
    ) -> None:
        self._problem, self._model, self._following = problem, model, following
        self._acquisition = acquisition
        self._now = self._improvement(acquisition)
        unit = max(problem.tolerance, math.sqrt(problem.noise_variance), 1e-3)
        edges = {problem.baseline_metric - loss * unit for loss in _LOSSES} | {model.target}
        self._edges = (*sorted(edges, reverse=True), -math.inf)

    def after(self, points: Tensor) -> Tensor:
        """What cheap trials at ``points`` [n, 2] add to the gain of the next full one; ``[n]``."""
        gains = [(self._now @ chance).amax(dim=0) for _, chance in self._outcomes(points)]
        return torch.stack(gains).sum(dim=0) - self._now.sum(dim=-1).max()

    def after_full(self, point: Tensor) -> float:
        """What the next full trial gains after one at ``point`` [1, 2]."""
        now = self._acquisition
        better = max(now.incumbent, float(self._problem.utility_at(point)))
        improved = self._improvement(
            KnownObjectiveCEI(self._model, now.utility, better, now.X_pending)
        )
        return sum(
            float(((improved if edge >= self._model.target else self._now) @ chance).max())
            for edge, chance in self._outcomes(point)
        )

    def _improvement(self, acquisition: KnownObjectiveCEI) -> Tensor:
        """Each member's part in what a full trial adds to what is pending, shape ``[j, S]``."""
        gain: Tensor = acquisition.by_member(self._following.unsqueeze(-2)).exp()
        if acquisition.X_pending is not None:
            gain = gain - acquisition.by_member(self._following[:1, None][:, :0]).exp()
        return gain

    def _outcomes(self, points: Tensor) -> Iterator[tuple[float, Tensor]]:
        """The lower end of each interval of the metric, and each member's probability of it.

        The probabilities are of shape ``[S, n]``; the intervals are given best first.
        """
        mean, sd, _ = self._model.outlook(points)
        sd = (sd**2 + self._problem.noise_variance).sqrt()
        above = torch.zeros_like(mean)
        for edge in self._edges:
            reached = torch.special.ndtr((mean - edge) / sd)
            yield edge, reached - above
            above = reached
