"""Times of callables that take turns, so that a noisy machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: Over all runs.
        iqr: Distance of the quartiles.
        minimum: The shortest run.
        runs: How many there were.
    """

    median: float
    iqr: float
    minimum: float
    runs: int

    @classmethod
    def of(cls, seconds: tuple[float, ...]) -> Timing:
        """The summary of some runs."""
        low, high = _quartiles(seconds)
        return cls(statistics.median(seconds), high - low, min(seconds), len(seconds))


@dataclass(frozen=True)
class Ratio:
    """How many times faster something is: median and quartiles over rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        seconds: Of every round, by name; entries with the same index were measured in turn.
    """

    seconds: Mapping[str, tuple[float, ...]]

    def timing(self, name: str) -> Timing:
        """Seconds of one callable."""
        return Timing.of(self.seconds[name])

    def speedup(self, name: str, over: str) -> Ratio:
        """How many times faster than another one it is, round by round.

        Example:
            >>> Comparison({"old": (2.0, 6.0, 4.0), "new": (1.0, 2.0, 2.0)}).speedup("new", "old")
            Ratio(median=2.0, low=2.0, high=2.5)
        """
        pairs = zip(self.seconds[name], self.seconds[over], strict=True)
        ratios = tuple(theirs / ours for ours, theirs in pairs)
        return Ratio(statistics.median(ratios), *_quartiles(ratios))


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    min_seconds: float = 0.5,
    min_rounds: int = 10,
    turn_seconds: float = 0.0,
) -> Comparison:
    """Time callables in turn, in one process.

    Each round gives every one of them a turn, the first one being another in every round; two calls
    beforehand are not counted. Where CUDA is in use, a turn ends when the device is done.

    Args:
        functions: By name.
        min_seconds: How long to measure, all together.
        min_rounds: How many rounds to measure at least.
        turn_seconds: How long a turn takes at least: a callable that needs less is called several
            times in a row, which keeps the caches its own, and the median of them counts.

    Raises:
        ValueError: If there is nothing to time, or no time to do it.

    Example:
        >>> compare({"sum": lambda: sum(range(1000))}, min_seconds=0.01).timing("sum").runs >= 10
        True
    """
    if not functions:
        raise ValueError("functions must hold something to time")
    if not min_seconds > 0 or min_rounds < 1:
        raise ValueError(
            "min_seconds must be positive and min_rounds at least 1, "
            f"got {min_seconds!r} and {min_rounds!r}"
        )
    if not turn_seconds >= 0:
        raise ValueError(f"turn_seconds must not be negative, got {turn_seconds!r}")
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for function in functions.values():
        function()
        _seconds(function)
    end = time.perf_counter() + min_seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_turn(functions[name], turn_seconds))
        rounds += 1
    return Comparison({name: tuple(values) for name, values in seconds.items()})


def finish() -> None:
    """Wait until CUDA, if it is in use, has done all that it was given."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _turn(function: Callable[[], Any], seconds: float) -> float:
    end = time.perf_counter() + seconds
    times = [_seconds(function)]
    while time.perf_counter() < end:
        times.append(_seconds(function))
    return statistics.median(times)


def _seconds(function: Callable[[], Any]) -> float:
    finish()
    start = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - start


def _quartiles(values: tuple[float, ...]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
