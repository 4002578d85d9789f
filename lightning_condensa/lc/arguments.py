"""Checks of numbers that users give."""

from __future__ import annotations

import math


def check_int(name: str, value: object, low: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an int of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an int >= {low}, got {value!r}")


def check_range(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number in ``[low, high]``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or value in (math.inf, low if open_low else None):  # type: ignore[operator]
        left, right = "(" if open_low else "[", ")" if high == math.inf else "]"
        raise ValueError(f"{name} must be a number in {left}{low}, {high}{right}, got {value!r}")
