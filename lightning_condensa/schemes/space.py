"""Search dimensions: what may stand in a scheme where a value would."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """A real interval for the search to choose from.

    Attributes:
        low: Smallest value.
        high: Largest value, above ``low``.
        log: Whether the search spaces its candidates evenly in the logarithm.

    Example:
        >>> Range(0.005, 1.0, log=True)
        Range(low=0.005, high=1.0, log=True)
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"Range needs finite low < high, got low={self.low!r}, high={self.high!r}"
            )
        if self.log and self.low <= 0:
            raise ValueError(f"Range with log=True needs low > 0, got low={self.low!r}")

    def at(self, fraction: float) -> float:
        """The value at a fraction of the way from ``high`` (0) to ``low`` (1)."""
        if self.log:
            value = self.high * math.exp(fraction * math.log(self.low / self.high))
        else:
            value = self.high + (self.low - self.high) * fraction
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Choice:
    """A finite set of options for the search to choose from.

    Attributes:
        options: At least two different values.

    Example:
        >>> Choice(["float16", "int8"]).options
        ('float16', 'int8')
    """

    options: Sequence[Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        if len(set(self.options)) < 2 or len(set(self.options)) != len(self.options):
            raise ValueError(
                f"Choice needs at least two options, all different, got {self.options!r}"
            )


Dimension = Range | Choice


def is_dimension(value: object) -> bool:
    """Whether ``value`` is a search dimension rather than a value."""
    return isinstance(value, Range | Choice)
