"""What an acquisition needs to know of the constraint."""

# ruff: noqa: N803 - `X` is BoTorch's name for points

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_condensa.search.problem import Observation, Problem

__all__ = ["Feasibility", "FeasibilityModel", "Outlook", "aim", "enough", "feasible_ones"]

#: Share of the margin that a trial is meant to show by itself where others can speak for it. Of
#: 1, 0.7, 0.5 and 0.3 on synthetic cliffs, half came nearest to the optimum without more winners
#: that are truly infeasible.
_SHOWN = 0.5


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


class Outlook(NamedTuple):
    """The metric that training would give, given each of ``S`` members: independent normals.

    On a scale of the model's own that grows with the metric; without the noise of measuring.

    Args:
        mean: Shape ``[..., S, q]``.
        sd: Standard deviations, > 0, of that shape.
        log_weights: Log-probabilities of the members, shape ``[S]``.
    """

    mean: Tensor
    sd: Tensor
    log_weights: Tensor


class FeasibilityModel(Protocol):
    """A model of the metric that an acquisition can use."""

    def feasibility(self, X: Tensor) -> Feasibility:
        """Feasibility of the ``q`` points of each batch, jointly; ``X`` is ``[..., q, d]``."""
        ...

    def certainty(self, seen: Observation, level: float) -> float:
        """Probability that a model of the history truly reaches a level."""
        ...

    def outlook(self, X: Tensor) -> Outlook:
        """The metric at the ``q`` points of each batch, jointly; ``X`` is ``[..., q, d]``."""
        ...

    def worth(self, seen: Observation) -> Tensor:
        """What a measured model of the history is truly expected to be, on the outlook's scale.

        Shape ``[S]``; of a batch of several points the members are others, in which case it is
        one value, ``[1]``.
        """
        ...

    def predict(self, X: Tensor, coverage: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
        """Centre and central band of the metric at ``X`` [N, d]; three tensors ``[N]``."""
        ...


def aim(problem: Problem) -> float:
    """The metric a trial should show where a model of all trials decides what is feasible."""
    return replace(problem, z=_SHOWN * problem.z).target


def enough(problem: Problem, seen: Observation, probability: float | None) -> bool:
    """Whether a model counts as feasible.

    Args:
        problem: With a margin, it is the probability that must be that of the margin; without, the
            measured metric decides.
        seen: The measurement.
        probability: That the model truly keeps the level; ``None`` where nobody has said: then the
            measurement must show it by itself.
    """
    if problem.z <= 0 or probability is None:
        return seen.feasible(problem.level, problem.z)
    return probability >= float(torch.special.ndtr(torch.tensor(problem.z, dtype=torch.float64)))


def feasible_ones(
    problem: Problem, history: Sequence[Observation], model: FeasibilityModel
) -> list[bool]:
    """Which of the history count as feasible, by what all of it says."""
    asked = problem.z > 0
    return [
        enough(problem, seen, model.certainty(seen, problem.level) if asked else None)
        for seen in history
    ]
