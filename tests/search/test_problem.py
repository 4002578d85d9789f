from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lightning_condensa.search.problem import Observation, Problem, best_feasible, nearest_miss


def seen(u: float, metric: float | None, utility: float | None = None) -> Observation:
    return Observation(torch.tensor([u]), metric, 1e-4, utility, diverged=metric is None)


@pytest.fixture
def problem() -> Problem:
    u = torch.linspace(0.1, 3.0, 30, dtype=torch.float64)
    dense = Observation(torch.zeros(1), 0.95, 1e-6, 0.0)
    return Problem(u.unsqueeze(-1), 2 * u, dense, 0.93, 1e-4, cliff=True, z=1.0)


def test_best_is_the_best_feasible_and_never_an_infeasible_one() -> None:
    history = [seen(1, 0.95, 1.0), seen(3, 0.80, 3.0), seen(2, 0.94, 2.0), seen(4, None)]
    assert best_feasible(history, level=0.93) == 2
    assert best_feasible(history, level=0.93, z=1.5) == 0
    assert best_feasible(history, level=0.99) is None
    assert best_feasible([], level=0.5) is None


def test_nearest_miss() -> None:
    assert nearest_miss([seen(1, 0.5), seen(2, 0.7), seen(3, None)]) == 1
    assert nearest_miss([seen(3, None)]) is None


def test_derived_figures(problem: Problem) -> None:
    assert problem.tolerance == pytest.approx(0.02)
    assert problem.target == pytest.approx(0.94)
    points = torch.tensor([[[0.11]], [[2.98]]])
    assert problem.utility_at(points).flatten().tolist() == pytest.approx([0.2, 6.0])
    assert problem.utility_of(seen(3.0, 0.9)) == pytest.approx(6.0)
    assert problem.utility_of(seen(3.0, 0.9, utility=5.5)) == 5.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": torch.empty(0, 1)}, "candidates must have shape"),
        ({"utility": torch.zeros(3)}, "utility must have shape"),
        ({"utility": torch.full((30,), torch.nan)}, "utility must be finite"),
        ({"baseline": seen(0.0, None)}, "baseline must have a metric"),
        ({"baseline": Observation(torch.zeros(2), 0.9, 0.0, 0.0)}, "baseline must have a point"),
        ({"baseline": Observation(torch.zeros(1), 20.0, 0.0, 0.0)}, "cliff needs"),
        ({"noise_variance": -1.0}, "noise_variance must be finite"),
        ({"level": float("nan")}, "level and z must be finite"),
    ],
)
def test_wrong_problems_are_refused(problem: Problem, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(problem, **change)


@pytest.mark.parametrize(
    "fields",
    [
        {"point": torch.zeros(1, 1)},
        {"variance": -1.0},
        {"metric": None},
        {"metric": float("nan")},
        {"diverged": True},
    ],
)
def test_wrong_observations_are_refused(fields: dict[str, Any]) -> None:
    right: dict[str, Any] = {
        "point": torch.zeros(1), "metric": 0.9, "variance": 0.0, "utility": None
    }  # fmt: skip
    with pytest.raises(ValueError):
        Observation(**(right | fields))
