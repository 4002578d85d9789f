"""What one finished evaluation has shown."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Observation"]


@dataclass(frozen=True)
class Observation:
    """One finished evaluation.

    Args:
        point: Coordinates, shape ``[d]``, float64.
        metric: The quality of the compressed model, signed so that higher is better; None when
            the evaluation diverged.
        variance: Variance of the noise of ``metric``.
        utility: The known objective as measured at this point, higher is better, on the scale of
            `Problem.utility`; None when it was not measured.
        diverged: Whether training ended without a usable metric. Such a point is known to be
            infeasible; it is not missing data.
        bound: What the metric of a training that was not finished would have stayed below; None
            for a finished one.
        further: Utilities under further objectives, as measured.

    Raises:
        ValueError: If ``point`` is not a vector, ``variance`` is negative or not finite, or
            ``metric``, ``diverged`` and ``bound`` contradict each other.

    Example:
        >>> Observation(torch.tensor([2.3]), metric=0.97, variance=1e-6, utility=2.2).diverged
        False
    """

    point: Tensor
    metric: float | None
    variance: float
    utility: float | None
    diverged: bool = False
    bound: float | None = None
    further: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Validate, and hold the point in double precision."""
        if self.point.ndim != 1:
            raise ValueError(f"point must have shape [d], got {list(self.point.shape)}")
        if not (math.isfinite(self.variance) and self.variance >= 0):
            raise ValueError(f"variance must be finite and >= 0, got {self.variance}")
        if self.diverged + (self.metric is not None) + (self.bound is not None) != 1:
            raise ValueError(
                "metric must be None exactly when diverged or bounded, got "
                f"metric={self.metric} with diverged={self.diverged} and bound={self.bound}"
            )
        if self.bound is not None and not math.isfinite(self.bound):
            raise ValueError(f"bound must be finite (or None), got {self.bound}")
        if self.metric is not None and not math.isfinite(self.metric):
            raise ValueError(f"metric must be finite (or None when diverged), got {self.metric}")
        object.__setattr__(self, "point", self.point.detach().to(torch.float64))

    @property
    def censored(self) -> bool:
        """Whether the metric is only known to lie below something."""
        return self.metric is None

    def ceiling(self, level: float) -> float:
        """What a censored metric lies below: its bound, or for a diverged run the level."""
        return level if self.bound is None else self.bound

    def feasible(self, level: float, z: float = 0.0) -> bool:
        """Whether the metric is at least ``level`` by a margin of ``z`` standard deviations."""
        return self.metric is not None and self.metric - z * math.sqrt(self.variance) >= level
