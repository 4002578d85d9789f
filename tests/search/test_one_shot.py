"""What validation of the untrained network tells a search along one density."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from toy import CLIFF, loaders, search, toy

from lightning_condensa import Prune, Range
from lightning_condensa.search.problem import Problem
from lightning_condensa.search.strategies import KnownObjectiveStrategy


class Spy(KnownObjectiveStrategy):
    """Keeps the problems that it is asked about."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def suggest(self, problem: Problem, *rest: Any, **more: Any) -> torch.Tensor:
        self.problems.append(problem)
        return super().suggest(problem, *rest, **more)


def told(directory: Path, **changes: Any) -> Problem:
    searching = search(directory, max_trials=1, **changes)
    searching.strategy = spy = Spy()
    searching.fit(toy(), **loaders())
    return spy.problems[0]


def attributes(directory: Path) -> dict[str, Any]:
    storage = f"sqlite:///{directory}/study.db"
    return optuna.load_study(study_name="condensa", storage=storage).user_attrs


def test_the_strategy_is_told_where_the_untrained_network_falls(tmp_path: Path) -> None:
    problem = told(tmp_path)
    # By a tolerance of 0.05, 0.1 is lost: 0.2 beyond the cliff of the toy. Six places are coarse.
    assert problem.scan is not None
    assert float(problem.scan[0]) == pytest.approx(0.2 - math.log(CLIFF), abs=0.45)
    assert len(attributes(tmp_path)["sensitivity"]["metrics"]["density"]) == 7
    assert told(tmp_path / "none", scan=False).scan is None
    assert "sensitivity" not in attributes(tmp_path / "none")


def test_no_scan_where_nothing_can_be_made_of_it(tmp_path: Path) -> None:
    assert told(tmp_path, metric="val_loss", mode="min").scan is None
    assert "sensitivity" not in attributes(tmp_path)


def test_a_range_that_begins_beyond_the_cliff_counts_from_the_dense_model(tmp_path: Path) -> None:
    problem = told(tmp_path, scheme=Prune(Range(0.005, 0.03, log=True)))
    assert problem.scan is not None
    assert float(problem.scan[0]) == pytest.approx(-math.log(0.03))
