"""How sure it is that a model which was measured truly keeps its metric."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_condensa.search.problem import Observation

__all__ = ["expected_metric", "margin_of", "probability_of_level"]


def margin_of(confidence: float | None) -> float:
    """The margin in standard deviations that a confidence asks for; none where ``None``.

    Raises:
        ValueError: If it is no probability of at least a half.

    Example:
        >>> round(margin_of(0.95), 2)
        1.64
    """
    if confidence is None:
        return 0.0
    number = isinstance(confidence, int | float) and not isinstance(confidence, bool)
    if not number or not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be in [0.5, 1), got {confidence!r}")
    return float(torch.special.ndtri(torch.tensor(confidence, dtype=torch.float64)))


def expected_metric(seen: Observation, mean: Tensor, variance: Tensor) -> Tensor:
    """What each member of an ensemble takes the metric of a measured model to be.

    The measurement is drawn towards what the member expects at its point by Bayes' rule.

    Args:
        seen: A measurement.
        mean: What the members expect, shape ``[S]``.
        variance: How far a training run falls from that, without the noise of measuring, ``[S]``.

    Returns:
        Shape ``[S]``.

    Raises:
        ValueError: If nothing was measured.

    Example:
        >>> seen = Observation(torch.zeros(1), metric=0.97, variance=1e-4, utility=None)
        >>> expected_metric(seen, torch.tensor([0.95]), torch.tensor([1e-4]))
        tensor([0.9600])
    """
    if seen.metric is None:
        raise ValueError("seen must have a metric, got a censored observation")
    gain = 1 / (1 + max(seen.variance, 1e-18) / variance.clamp(min=1e-18))
    return mean + gain * (seen.metric - mean)


def probability_of_level(
    seen: Observation, level: float, mean: Tensor, variance: Tensor, log_weights: Tensor
) -> float:
    """Probability that the metric of a measured model, without the noise of measuring, is enough.

    Each of ``S`` members of an ensemble expects the metric of a model trained at this point to be
    normal, before it is measured. The measurement is combined with that by Bayes' rule: a lucky one
    is drawn towards what is expected of its neighbours. This is what corrects for choosing the
    winner, which tends to be a lucky one; a margin on its own measurement does not.

    Args:
        seen: The measurement. A diverged model keeps nothing.
        level: What the metric must reach.
        mean: What the members expect, shape ``[S]``.
        variance: How far a training run falls from that, without the noise of measuring, ``[S]``;
            infinite where they expect nothing.
        log_weights: Log-probabilities of the members after all measurements, ``[S]``.

    Returns:
        A probability.

    Example:
        >>> seen = Observation(torch.zeros(1), metric=0.97, variance=1e-4, utility=None)
        >>> expected = torch.tensor([0.95], dtype=torch.float64)
        >>> sure = torch.zeros(1, dtype=torch.float64)
        >>> lucky = probability_of_level(seen, 0.96, expected, torch.tensor([1e-6]), sure)
        >>> lucky < 0.01
        True
    """
    if seen.metric is None:
        return 0.0
    noise = max(seen.variance, 1e-18)
    gain = 1 / (1 + noise / variance.clamp(min=1e-18))
    expected = mean + gain * (seen.metric - mean)
    margin = (expected - level) / (gain * noise).sqrt()
    return min(float((torch.special.ndtr(margin) * log_weights.exp()).sum()), 1.0)  # of rounding
