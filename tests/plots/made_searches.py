"""Searches made by hand, whose figures are known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_condensa.search import Baseline, Curve, SearchResult, Trial


def trial(
    number: int,
    values: dict[str, Any],
    metric: float | None,
    objective: float | None,
    state: str,
    **changes: Any,
) -> Trial:
    known = Trial(
        number=number,
        values=values,
        state=state,
        metric=metric,
        variance=1e-5,
        objective=objective,
        details={},
        metrics={},
        steps=100,
        seconds=10.0,
        message="",
        directory=Path("nowhere"),
        started=1.7e9 + 11.0 * number,
    )
    return replace(known, **changes)


def result(trials: list[Trial], **changes: Any) -> SearchResult:
    known = SearchResult(
        baseline=Baseline(metric=0.95, variance=1e-5, objective=16000.0, samples=1000),
        trials=tuple(trials),
        level=0.90,
        target=0.90,
        metric="val_acc",
        mode="max",
        objective="MemoryFootprint",
        direction="min",
        unit="bytes",
        curve=None,
        scheme="prune:\n  density: 0.1\n",
    )
    return replace(known, **changes)


def accuracy(density: float) -> float:
    return 0.95 - 0.5 * min(max(math.log(0.05 / density), 0.0), 1.0)


def curve(sign: float = 1.0, name: str = "density") -> Curve:
    values = [0.005 * 200 ** (1 - i / 99) for i in range(100)]
    center = [accuracy(v) for v in values]
    if sign < 0:
        center = [1.05 - c for c in center]
    spread = [0.002 + 0.05 * math.exp(-(math.log(v / 0.05) ** 2)) for v in values]
    return Curve(
        dimension=name,
        values=values,
        center=center,
        lower=[c - s for c, s in zip(center, spread, strict=True)],
        upper=[c + s for c, s in zip(center, spread, strict=True)],
    )


def one_dimension(name: str = "density", **changes: Any) -> SearchResult:
    """Eight trials over a density: feasible, infeasible, diverged and failed ones."""
    trials = []
    for number, density in enumerate([0.07, 0.03, 0.045, 0.05, 0.046, 0.2]):
        metric = accuracy(density)
        state = "feasible" if metric >= 0.9 else "infeasible"
        trials.append(trial(number, {name: density}, metric, 16000 * density + 200, state))
    trials.append(trial(6, {name: 0.006}, None, 296.0, "diverged", message="val_acc is nan"))
    trials.append(
        trial(7, {name: 0.02}, None, None, "failed", message="RuntimeError: boom", seconds=0.0)
    )
    return result(trials, **{"curve": curve(name=name), **changes})


def several_dimensions(groups: int = 4, count: int = 12) -> SearchResult:
    """Densities of some groups and their bits."""
    trials = []
    for number in range(count):
        densities = [0.02 * (1 + (number * (g + 3)) % 17) for g in range(groups)]
        bits = [(4, 8, 16)[(number + g) % 3] for g in range(groups)]
        values: dict[str, Any] = {f"prune.layers.{g}.density": d for g, d in enumerate(densities)}
        values |= {f"quantize.layers.{g}.bits": b for g, b in enumerate(bits)}
        values["quantize.dtype"] = ("int8", "float16")[number % 2]
        mean = sum(densities) / groups
        metric = accuracy(max(0.045, mean / 4)) - 0.03 * ((number * 7) % 5) / 5
        objective = 16000 * mean * sum(bits) / groups / 16
        state = "feasible" if metric >= 0.9 else "infeasible"
        trials.append(trial(number, values, metric, objective, state))
    return result(trials)
