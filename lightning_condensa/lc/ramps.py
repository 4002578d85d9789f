"""Shapes of the way from the dense network to the compressed one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

#: Maps the share of the ramp that has passed to the share of the way made, both in [0, 1].
Ramp = Callable[[float], float]


@dataclass(frozen=True)
class PolynomialRamp:
    """``1 − (1 − t)^power``: the higher the power, the sooner near the end.

    3 is the cubic ramp of Zhu & Gupta (arXiv:1710.01878), 1 a straight line.

    Example:
        >>> PolynomialRamp(3)(0.5)
        0.875

    Attributes:
        power: At least 1.
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        if not isinstance(self.power, Real) or not 1 <= self.power < math.inf:
            raise ValueError(f"power must be a number >= 1, got {self.power!r}")

    def __call__(self, t: float) -> float:
        """The share of the way at ``t``."""
        return float(1 - (1 - t) ** self.power)


def as_ramp(shape: Any) -> Ramp:
    """A ramp from its power or a function.

    Raises:
        ValueError: If it is neither, or does not lead from 0 to 1 without turning back.
    """
    if isinstance(shape, Real) and not isinstance(shape, bool):
        return PolynomialRamp(float(shape))
    if not callable(shape):
        raise ValueError(f"shape must be a power or a function of [0, 1], got {shape!r}")
    values = [shape(i / 100) for i in range(101)]
    rising = all(a <= b + 1e-9 for a, b in pairwise(values))
    if not rising or abs(values[0]) > 1e-6 or abs(values[-1] - 1) > 1e-6:
        raise ValueError(
            "shape must rise from 0 at 0 to 1 at 1, got "
            f"{values[0]:g} at 0, {values[50]:g} at 0.5 and {values[-1]:g} at 1"
        )
    ramp: Ramp = shape
    return ramp
