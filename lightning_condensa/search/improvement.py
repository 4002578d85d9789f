"""Expected improvement of the metric itself, for searches within a budget."""

# ruff: noqa: N803 - `X` is BoTorch's name for points

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_condensa.search.feasibility import FeasibilityModel
from lightning_condensa.search.problem import Observation

__all__ = ["MetricImprovement", "log_expected_excess"]

#: Draws of what pending trials may turn out to be, for each member of the surrogate.
_DRAWS = 8
#: Candidates that are looked at together, which bounds memory.
_CHUNK = 512


def log_expected_excess(z: Tensor) -> Tensor:
    r"""Logarithm of :math:`E[(z + \epsilon)_+] = \varphi(z) + z \Phi(z)` for a standard normal.

    Stable for any ``z``, as of Ament et al., Unexpected Improvements to Expected Improvement for
    Bayesian Optimization, 2023: with ``erfcx`` below -1, by its expansion far below.

    Example:
        >>> log_expected_excess(torch.tensor([0.0, 30.0]).double()).exp()
        tensor([ 0.3989, 30.0000], dtype=torch.float64)
        >>> bool(log_expected_excess(torch.tensor(-1e6).double()).isfinite())
        True
    """
    near, middle, far = z.clamp(min=-1.0), z.clamp(-1e4, -1.0), z.clamp(max=-1e4)
    density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    plain = (-0.5 * near**2).exp() / math.sqrt(2 * math.pi) + near * torch.special.ndtr(near)
    ratio = math.sqrt(math.pi / 2) * torch.special.erfcx(-middle / math.sqrt(2))
    below = density + torch.log1p((middle * ratio).clamp(min=-1 + 1e-12))
    deep = density - 2 * (-far).log()
    return torch.where(z > -1, plain.log(), torch.where(z > -1e4, below, deep))


class MetricImprovement:
    r"""Log of the expected improvement of the metric over the best model so far.

    Given a member ``m`` of the surrogate, the metric of a model trained at ``x`` is normal, and
    what each finished trial is truly worth is its measurement, drawn towards what the member
    expects by the noise of measuring:

    .. math::
        \alpha(x) = \log \sum_m w_m E[(Y_m(x) - \max_i y_{m,i})_+]

    so the incumbent is as uncertain as anything else (noisy expected improvement; Letham et al.,
    2019). Pending trials stand with draws of what they may turn out to be. The noise of measuring
    is no improvement; the luck of a run is, as its model is what one gets.

    Args:
        model: The surrogate.
        incumbents: Finished evaluations within the budget.
        pending: Points under evaluation, shape ``[k, d]``.
        seed: Of the draws.
    """

    def __init__(
        self,
        model: FeasibilityModel,
        incumbents: Sequence[Observation],
        pending: Tensor,
        seed: int,
    ) -> None:
        """Hold what is to be beaten."""
        self._model, self.pending, self._seed = model, pending, seed
        worth = [model.worth(seen) for seen in incumbents if seen.metric is not None]
        self._best = torch.stack(worth).amax(dim=0) if worth else None

    def __call__(self, X: Tensor) -> Tensor:
        """Evaluate at the points ``X`` [N, d], each by itself; shape ``[N]``."""
        threshold = self._floor(X) if self._best is None else self._best
        return torch.cat([self._value(part, threshold) for part in torch.split(X, _CHUNK)])

    def _floor(self, X: Tensor) -> Tensor:
        """With nothing to beat: below everything by its range, so that the mean decides."""
        centre = torch.cat(
            [self._model.outlook(x.unsqueeze(-2)).mean for x in torch.split(X, _CHUNK)]
        )
        low, high = centre.aminmax()
        return (2 * low - high - 1e-6).expand(centre.shape[-2])

    def _value(self, X: Tensor, threshold: Tensor) -> Tensor:
        together = torch.cat([X.unsqueeze(-2), self.pending.expand(len(X), -1, -1)], dim=-2)
        mean, sd, log_weights = self._model.outlook(together)  # n x S x (1 + k)
        beaten = threshold.unsqueeze(-1)  # S x 1
        if len(self.pending):
            generator = torch.Generator().manual_seed(self._seed)
            shape = (mean.shape[-2], _DRAWS, len(self.pending))
            noise = torch.randn(shape, generator=generator, dtype=mean.dtype)
            drawn = mean[..., 1:].unsqueeze(-2) + sd[..., 1:].unsqueeze(-2) * noise
            beaten = torch.maximum(beaten, drawn.amax(dim=-1))  # n x S x draws
        z = (mean[..., :1] - beaten) / sd[..., :1]
        value = sd[..., :1].log() + log_expected_excess(z) - math.log(z.shape[-1])
        return torch.logsumexp(value + log_weights.unsqueeze(-1), dim=(-2, -1))
