"""How sure a search is of what it found."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import loaders, search, toy

from lightning_condensa.search.certification import margin_of, probability_of_level
from lightning_condensa.search.ensemble import DamageMixture
from lightning_condensa.search.feasibility import enough, feasible_ones
from lightning_condensa.search.problem import Observation, best_feasible
from lightning_condensa.search.strategies import KnownObjectiveStrategy
from lightning_condensa.search.surrogates import BilogGP, CliffEnsemble
from lightning_condensa.search.synthetic import SyntheticCliff
from lightning_condensa.search.synthetic_groups import SyntheticGroups

ONE = torch.zeros(1, dtype=torch.float64)


def seen(metric: float | None, variance: float = 1e-4) -> Observation:
    return Observation(torch.zeros(1), metric, variance, utility=None, diverged=metric is None)


@given(
    metric=st.floats(0.5, 1.0),
    mean=st.floats(0.5, 1.0),
    noise=st.floats(1e-4, 0.05),
    spread=st.floats(1e-4, 0.05),
)
def test_one_member_is_the_conjugate_posterior(
    metric: float, mean: float, noise: float, spread: float
) -> None:
    precision = noise**-2 + spread**-2
    posterior = (metric / noise**2 + mean / spread**2) / precision
    expected = statistics.NormalDist(posterior, precision**-0.5).cdf
    found = probability_of_level(seen(metric, noise**2), 0.75, ONE + mean, ONE + spread**2, ONE)
    assert found == pytest.approx(1 - expected(0.75), abs=1e-7)


def test_an_exact_measurement_decides_and_a_diverged_model_keeps_nothing() -> None:
    doubtful = (torch.tensor([0.5]), torch.tensor([0.01]), ONE)
    assert probability_of_level(seen(0.9, 0.0), 0.8, *doubtful) == pytest.approx(1)
    assert probability_of_level(seen(0.7, 0.0), 0.8, *doubtful) == pytest.approx(0)
    assert probability_of_level(seen(None), 0.0, *doubtful) == 0.0


def test_winners_are_as_often_feasible_as_they_are_said_to_be() -> None:
    """Closer than by their own measurement, which knows nothing of having been chosen."""
    strategy = KnownObjectiveStrategy()
    rows = []
    for seed in range(24):
        case = SyntheticCliff.draw(seed)
        problem = case.problem()
        history: list[Observation] = []
        for trial in range(6):
            (index,) = strategy.propose(problem, history, None, q=1, seed=trial)
            history.append(case.observe(index))
        best = best_feasible(history, problem.level)
        if best is None:
            continue
        winner = history[best]
        truth = float(case.accuracy[problem.nearest(winner.point[None])] >= problem.level)
        sure = CliffEnsemble(problem, history, seed).certainty(winner, problem.level)
        margin = (winner.metric - problem.level) / winner.variance**0.5
        rows.append((truth, sure, statistics.NormalDist().cdf(margin)))
    truth, sure = (statistics.fmean(row[k] for row in rows) for k in (0, 1))
    assert len(rows) > 15 and truth < 0.95
    assert abs(sure - truth) < 0.12
    brier = [statistics.fmean((row[k] - row[0]) ** 2 for row in rows) for k in (1, 2)]
    assert brier[0] < brier[1]


def test_trials_speak_for_one_another() -> None:
    """With a confidence, winners keep it, and give less away than by their own margin."""
    strategy = KnownObjectiveStrategy()
    missed, regret = [], []
    for seed in range(10):
        case = SyntheticCliff.draw(seed)
        problem = case.problem(z=margin_of(0.95))
        history: list[Observation] = []
        for trial in range(6):
            (index,) = strategy.propose(problem, history, None, q=1, seed=trial)
            history.append(case.observe(index))
        good = feasible_ones(problem, history, strategy.surrogate(problem, history, seed))
        alone = best_feasible(history, problem.level, problem.z)
        by_margin = 0.0 if alone is None else history[alone].utility
        together = max((s.utility for s, ok in zip(history, good, strict=True) if ok), default=0.0)
        chosen = [s for s, ok in zip(history, good, strict=True) if ok and s.utility == together]
        at = [problem.nearest(s.point[None]) for s in chosen]
        missed.append(any(float(case.accuracy[i]) < problem.level for i in at))
        regret.append(by_margin - together)
    assert sum(missed) <= 1
    assert statistics.fmean(regret) < 0


def test_without_a_confidence_the_measurement_decides() -> None:
    problem = SyntheticCliff.draw(0).problem()
    assert enough(problem, seen(problem.level + 1e-6), probability=0.01)
    assert not enough(problem, seen(problem.level - 1e-6), probability=0.99)


def test_with_a_confidence_the_probability_decides() -> None:
    problem = SyntheticCliff.draw(0).problem(z=margin_of(0.9))
    at_level = seen(problem.level)
    assert enough(problem, at_level, 0.901) and not enough(problem, at_level, 0.899)
    assert not enough(problem, at_level, None)
    assert enough(problem, seen(problem.level + 2 * at_level.variance**0.5), None)


def test_ensembles_over_groups_doubt_a_lucky_measurement() -> None:
    case = SyntheticGroups.draw(0, groups=3)
    problem = case.problem()
    gentle, harsh = case.domain.points(torch.tensor([[2, 2, 2], [40, 40, 40]]))
    noise = problem.noise_variance
    history = [
        Observation(gentle, problem.baseline_metric, noise, None),
        Observation(harsh, problem.level - 0.3, noise, None),
        Observation(harsh, None, noise, None, diverged=True),
    ]
    mixture = DamageMixture(problem, history, seed=0)
    sure, hopeless, nothing = (mixture.certainty(one, problem.level) for one in history)
    assert sure > 0.9 and hopeless < 0.01 and nothing == 0
    lucky = Observation(harsh, problem.level + noise**0.5, noise, None)
    alone = statistics.NormalDist().cdf(1.0)
    assert mixture.certainty(lucky, problem.level) < 0.9 * alone


def test_a_process_goes_by_the_measurement() -> None:
    case = SyntheticCliff.draw(0)
    problem = replace(case.problem(), cliff=False)
    history = [case.observe(i) for i in (10, 200)]
    process = BilogGP(problem, history, seed=0)
    for one in history:
        margin = (one.metric - problem.level) / one.variance**0.5
        expected = statistics.NormalDist().cdf(margin)
        assert process.certainty(one, problem.level) == pytest.approx(expected, abs=1e-6)


def test_a_result_says_how_sure_it_is(tmp_path: Path) -> None:
    result = search(tmp_path, max_trials=4).fit(toy(), **loaders())
    assert all(0 <= t.probability <= 1 for t in result.trials)
    best = result.best
    assert best is not None
    text = result.summary()
    assert f"feasible with probability {best.probability:.2f}, its metric's noise sd" in text
