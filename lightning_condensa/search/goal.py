"""What a search is asked for: a metric to keep, or an objective not to exceed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_condensa.objectives import Direction

__all__ = ["Goal"]

#: Share of the dense model's metric that counts as a small difference where no tolerance is given.
_SMALL = 0.02


@dataclass(frozen=True)
class Goal:
    """Either the best objective with the metric within a tolerance, or the reverse.

    With a tolerance the metric decides what is feasible, and the objective is optimized; with a
    budget the objective decides, and the metric is optimized.

    Args:
        mode: Whether more (``"max"``) or less of the metric is better.
        direction: The same of the objective.
        tolerance: How far the metric may be from the dense model's, in its own units.
        budget: What the objective may come to at most; at least where it is maximized.

    Raises:
        ValueError: If not exactly one of tolerance and budget is given, or it is out of range.

    Example:
        >>> small = Goal("max", "min", budget=1e6)
        >>> small.within(999_000.0), small.within(1_000_001.0), small.within(None)
        (True, False, False)
        >>> Goal("min", "min", tolerance=0.1).level(2.0)
        2.1
    """

    mode: Direction
    direction: Direction
    tolerance: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        """Validate."""
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {self.mode!r}")
        if (self.tolerance is None) == (self.budget is None):
            raise ValueError(
                "give either tolerance, how far the metric may fall while the objective is "
                "optimized, or budget, what the objective may be while the metric is optimized; "
                f"got tolerance={self.tolerance!r} and budget={self.budget!r}"
            )
        if self.tolerance is not None and not (_is_finite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance must be a finite number >= 0, got {self.tolerance!r}")
        if self.budget is not None and not _is_finite(self.budget):
            raise ValueError(f"budget must be a finite number, got {self.budget!r}")

    @property
    def sign(self) -> float:
        """1 where more of the metric is better, else -1."""
        return 1.0 if self.mode == "max" else -1.0

    @property
    def optimized(self) -> Direction:
        """Direction of what is optimized."""
        return self.direction if self.budget is None else self.mode

    def level(self, dense: float) -> float | None:
        """The metric to keep, given the dense model's; ``None`` where there is a budget."""
        return None if self.tolerance is None else dense - self.sign * self.tolerance

    def small(self, dense: float) -> float:
        """A difference of the metric that is small, given the dense model's metric."""
        return _SMALL * max(abs(dense), 1e-9) if self.tolerance is None else self.tolerance

    def within(self, objective: float | None) -> bool:
        """Whether an objective keeps the budget; any does where there is none."""
        if self.budget is None:
            return True
        if objective is None:
            return False
        return objective <= self.budget if self.direction == "min" else objective >= self.budget


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
