"""What an acquisition needs to know of the constraint."""

# ruff: noqa: N803 - `X` is BoTorch's name for points

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_condensa.search.problem import Observation

__all__ = ["Feasibility", "FeasibilityModel"]


class Feasibility(NamedTuple):
    """Whether points will be seen to meet the level, given each of ``S`` members.

    Given a member, the outcomes at different points are independent, with probabilities
    ``ndtr(margin)``; what the points share is the member.

    Args:
        margin: Distance above the level in standard deviations of one evaluation, shape
            ``[..., S, q]``.
        log_weights: Log-probabilities of the members, shape ``[S]``.
    """

    margin: Tensor
    log_weights: Tensor

    @property
    def probability(self) -> Tensor:
        """Marginal probability of each point, shape ``[..., q]``."""
        weights = self.log_weights.exp().unsqueeze(-1)
        probability: Tensor = (torch.special.ndtr(self.margin) * weights).sum(dim=-2)
        return probability


class FeasibilityModel(Protocol):
    """A model of the metric that an acquisition of a known objective can use."""

    def feasibility(self, X: Tensor) -> Feasibility:
        """Feasibility of the ``q`` points of each batch, jointly; ``X`` is ``[..., q, d]``."""
        ...

    def certainty(self, seen: Observation, level: float) -> float:
        """Probability that a model of the history truly reaches a level."""
        ...

    def predict(self, X: Tensor, coverage: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
        """Centre and central band of the metric at ``X`` [N, d]; three tensors ``[N]``."""
        ...
