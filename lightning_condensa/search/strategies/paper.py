"""The two-step search of the Condensa paper, for fidelity and comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from botorch import fit_gpytorch_mll, settings
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.analytic import UpperConfidenceBound
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize
from botorch.utils.sampling import manual_seed
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

from lightning_condensa.search.acquisition import ILSUCB
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.strategies.base import (
    Strategy,
    require_level,
    require_one_coordinate,
)

__all__ = ["PaperStrategy"]


class PaperStrategy(Strategy):
    """Level set of the accuracy first, then the objective: one density, two steps.

    Joseph et al., A Programmable Approach to Neural Network Compression, IEEE Micro, 2020.
    (1) A Gaussian process of the raw metric over sparsity ``s``, sampled by ILS-UCB, locates
    ``s_acc`` where the metric crosses the level. (2) When the objective is monotone in ``s``, the
    answer is ``s_acc`` and step 1 simply goes on; otherwise, after ``level_set_trials``
    evaluations, GP-UCB of the objective is restricted to ``s <= s_acc``. The optimizer's source
    was not released with Condensa; where the paper is silent, ``initial`` points evenly spaced in
    ``s`` come first, BoTorch's default process is used, a diverged run counts as the worst metric
    seen (at most one tolerance below the level), and for a batch the pending points are taken to
    turn out as predicted.

    US patent 12,417,403 (NVIDIA, 2025) is reported to describe this two-step procedure; users
    should judge for themselves whether that concerns them. The default strategy is a different,
    one-step method.

    Args:
        gamma: Weight of ILS-UCB, as published.
        initial: Number of evenly spaced points before the first model, at least 1.
        level_set_trials: Evaluations spent on step 1 when the objective is not monotone.
        beta: Weight of the variance in GP-UCB.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        gamma: float = 0.95,
        initial: int = 4,
        level_set_trials: int = 6,
        beta: float = 4.0,
    ) -> None:
        """Hold the options."""
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}")
        if initial < 1 or level_set_trials < initial:
            raise ValueError(
                f"initial must be in [1, level_set_trials], got initial={initial} and "
                f"level_set_trials={level_set_trials}"
            )
        if beta < 0:
            raise ValueError(f"beta must be >= 0, got {beta}")
        self.gamma = gamma
        self.initial = initial
        self.level_set_trials = level_set_trials
        self.beta = beta

    def _select(
        self,
        problem: Problem,
        history: Sequence[Observation],
        pending: Tensor,
        free: Tensor,
        q: int,
        seed: int,
    ) -> list[int]:
        require_level(problem, "paper")
        sparsity = -torch.expm1(-require_one_coordinate(problem, "paper"))
        seen = -torch.expm1(-torch.stack([o.point[0] for o in history])) if history else None
        believed = -torch.expm1(-pending[:, 0])
        free = free.clone()
        chosen: list[int] = []
        for _ in range(q):
            started = len(history) + len(believed)
            if seen is None or started < self.initial:
                low, high = sparsity.aminmax()
                aim = low + (high - low) * (started % self.initial + 0.5) / self.initial
                score = -(sparsity - aim).abs()
            else:
                score = self._score(problem, sparsity, seen, history, believed, seed)
            index = int(score.masked_fill(~free, -torch.inf).argmax())
            chosen.append(index)
            free[index] = False
            believed = torch.cat([believed, sparsity[index : index + 1]])
        return chosen

    def _score(
        self,
        problem: Problem,
        sparsity: Tensor,
        seen: Tensor,
        history: Sequence[Observation],
        believed: Tensor,
        seed: int,
    ) -> Tensor:
        """Acquisition values of all candidates [N], -inf outside the domain."""
        metric = _fit(sparsity, seen, _metrics(problem, history), believed, seed)
        if _monotone(sparsity, problem.utility) or len(history) < self.level_set_trials:
            return _evaluate(ILSUCB(metric, problem.level, self.gamma), sparsity)
        measured = torch.tensor([problem.utility_of(o) for o in history], dtype=torch.float64)
        objective = _fit(sparsity, seen, measured, believed, seed)
        score = _evaluate(UpperConfidenceBound(objective, beta=self.beta), sparsity)
        with torch.no_grad():
            mean = metric.posterior(sparsity.reshape(-1, 1, 1)).mean.flatten()
        above = sparsity[mean >= problem.level]
        s_acc = above.max() if len(above) else sparsity.min()
        return score.masked_fill(sparsity > s_acc, -torch.inf)


def _metrics(problem: Problem, history: Sequence[Observation]) -> Tensor:
    measured = [o.metric for o in history if o.metric is not None]
    worst = min([problem.level - abs(problem.tolerance), *measured])
    return torch.tensor([worst if o.metric is None else o.metric for o in history]).double()


def _monotone(sparsity: Tensor, utility: Tensor) -> bool:
    steps = utility[sparsity.argsort()].diff()
    return bool((steps >= 0).all() or (steps <= 0).all())


def _evaluate(acquisition: AcquisitionFunction, sparsity: Tensor) -> Tensor:
    with torch.no_grad():
        values: Tensor = acquisition(sparsity.reshape(-1, 1, 1))
    return values


def _fit(
    sparsity: Tensor, seen: Tensor, values: Tensor, believed: Tensor, seed: int
) -> SingleTaskGP:
    """BoTorch's default process over sparsity; ``believed`` points turn out as it predicts."""
    bounds = torch.stack(sparsity.aminmax()).unsqueeze(-1)

    def model(x: Tensor, y: Tensor) -> SingleTaskGP:
        with settings.validate_input_scaling(False):  # equal values cannot be standardised
            return SingleTaskGP(
                x.unsqueeze(-1), y.unsqueeze(-1), input_transform=Normalize(1, bounds=bounds)
            )

    fitted = model(seen, values)
    with manual_seed(seed):
        fit_gpytorch_mll(ExactMarginalLogLikelihood(fitted.likelihood, fitted))
    if len(believed) == 0:
        return fitted
    with torch.no_grad():
        guess = fitted.posterior(believed.unsqueeze(-1)).mean.flatten()
    extended = model(torch.cat([seen, believed]), torch.cat([values, guess]))
    extended.load_state_dict(fitted.state_dict(), strict=False)
    extended.eval()
    return extended
