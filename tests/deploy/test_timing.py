"""Callables take turns, and their ratios come from the same rounds."""

from __future__ import annotations

import time

import pytest

from lightning_condensa import compare
from lightning_condensa.deploy import Comparison, Ratio, Timing


def test_all_take_turns_and_the_first_one_changes() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    compared = compare(functions, min_seconds=1e-6, min_rounds=4)
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert {n: len(s) for n, s in compared.seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_short_callables_have_longer_turns() -> None:
    calls: list[str] = []

    def short() -> None:
        calls.append("s")
        time.sleep(0.001)

    def long() -> None:
        calls.append("l")
        time.sleep(0.02)

    compared = compare({"s": short, "l": long}, min_seconds=1e-6, min_rounds=3, turn_seconds=0.02)
    assert calls.count("l") == 2 + 3
    assert calls.count("s") >= 2 + 2 * 3
    assert 0.001 <= compared.timing("s").minimum < 0.01  # of one call
    assert compared.timing("s").runs == 3


def test_seconds_are_those_of_the_clock() -> None:
    compared = compare(
        {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.004)}, min_seconds=0.1
    )
    short = compared.timing("short")
    assert 0.001 <= short.minimum <= short.median < 0.004
    assert short.runs >= 10
    assert sum(map(sum, compared.seconds.values())) > 0.05
    assert 1.5 < compared.speedup("short", "long").median < 15
    assert compared.speedup("long", "short").median < 1


def test_summaries() -> None:
    assert Timing.of((4.0, 1.0, 2.0, 3.0, 5.0)) == Timing(3.0, 2.0, 1.0, 5)
    assert Timing.of((2.0,)) == Timing(2.0, 0.0, 2.0, 1)
    # The ratio of every round, not that of the medians.
    compared = Comparison({"old": (1.0, 20.0, 300.0), "new": (1.0, 10.0, 100.0)})
    assert compared.speedup("new", "old") == Ratio(2.0, 1.5, 2.5)
    assert compared.speedup("new", "new") == Ratio(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("functions", "settings", "message"),
    [
        ({}, {}, "functions must hold something"),
        ({"a": int}, {"min_seconds": 0}, "min_seconds must be positive"),
        ({"a": int}, {"min_seconds": float("nan")}, "min_seconds must be positive"),
        ({"a": int}, {"min_rounds": 0}, "min_rounds at least 1"),
        ({"a": int}, {"turn_seconds": -1}, "turn_seconds must not be negative"),
    ],
)
def test_bad_arguments(functions, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(functions, **settings)
