"""Search dimensions: what may stand in a scheme where a value would."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
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
        numbers = all(
            isinstance(v, int | float) and math.isfinite(v) for v in (self.low, self.high)
        )
        if not numbers or not self.low < self.high:
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
        given = self.options
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise ValueError(f"Choice needs a list of options, got {given!r}")
        if len(given) < 2 or any(a == b for a, b in combinations(given, 2)):
            raise ValueError(f"Choice needs at least two options, all different, got {given!r}")
        object.__setattr__(self, "options", tuple(given))


Dimension = Range | Choice


def is_dimension(value: object) -> bool:
    """Whether ``value`` is a search dimension rather than a value."""
    return isinstance(value, Range | Choice)
