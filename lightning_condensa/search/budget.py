"""A bound on the known objective, in the terms of a strategy: which candidates keep it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_condensa.search.problem import Observation, Problem, best_within

__all__ = ["challenged", "log_within", "possible"]

#: Relative error of a known objective that is believed in before any was measured: training moves
#: the kept weights, and with them the bytes that their places take. As sure as one evaluation.
_PRIOR_ERROR = 0.01
#: Errors below this one are rounding.
_EXACT = 1e-9


def log_within(
    problem: Problem, history: Sequence[Observation], utility: Tensor | None = None
) -> Tensor:
    """Log-probability that a trained candidate turns out to keep the budget.

    What was known of finished evaluations is compared with what was measured: sizes are known
    nearly, a latency is measured with noise and may be shifted. The shift is the mean error, the
    spread its root mean square, both together with one evaluation's worth of a prior of 0 ± 1 %.

    Args:
        problem: With a budget, or without: then every candidate keeps it.
        history: Finished evaluations.
        utility: Known utilities; the candidates' where ``None``.

    Returns:
        Of the shape of ``utility``.

    Example:
        >>> u = torch.linspace(0, 2, 3, dtype=torch.float64)
        >>> dense = Observation(torch.zeros(1), metric=0.98, variance=1e-6, utility=0.0)
        >>> problem = Problem(
        ...     u[:, None], u, dense, level=0.97, noise_variance=1e-6, cliff=True, budget=1.0
        ... )
        >>> log_within(problem, []).exp().tolist()
        [0.0, 0.5, 1.0]
    """
    known = problem.utility if utility is None else utility
    if problem.budget is None:
        return torch.zeros_like(known)
    shift, spread = _error(problem, history)
    chance: Tensor = torch.special.log_ndtr((known + shift - problem.budget) / spread)
    return chance


def possible(problem: Problem, history: Sequence[Observation]) -> Tensor:
    """Which candidates keep the budget more likely than not, shape ``[N]``."""
    if problem.budget is None:
        return torch.ones(len(problem.utility), dtype=torch.bool)
    shift, _ = _error(problem, history)
    return problem.utility + shift >= problem.budget - _EXACT


def challenged(problem: Problem, history: Sequence[Observation]) -> Problem:
    """The problem whose level is the metric to beat: the best one measured within the budget.

    A surrogate is sharpest around the level; so it is where improvement begins. A problem without
    a budget, or one with nothing within it yet, stays as it is.
    """
    if problem.budget is None:
        return problem
    best = best_within(history, problem.budget)
    metric = None if best is None else history[best].metric
    return problem if metric is None else replace(problem, level=metric)


def _error(problem: Problem, history: Sequence[Observation]) -> tuple[float, float]:
    errors = [
        seen.utility - float(problem.utility_at(seen.point))
        for seen in history
        if seen.utility is not None
    ]
    squares = _PRIOR_ERROR**2 + sum(error**2 for error in errors)
    return sum(errors) / (len(errors) + 1), math.sqrt(squares / (len(errors) + 1))
