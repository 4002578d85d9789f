from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_condensa.search.problem import Observation, Problem, best_feasible
from lightning_condensa.search.strategies import (
    KnownObjectiveStrategy,
    PaperStrategy,
    Strategy,
    make_strategy,
)
from lightning_condensa.search.synthetic import SyntheticCliff

NAMES = ["condensa", "paper", "bisection", "random", "grid"]


def line(count: int = 40, cliff: bool = True, z: float = 0.0) -> Problem:
    u = torch.linspace(0.1, 4.0, count, dtype=torch.float64)
    dense = Observation(torch.zeros(1), 0.95, 1e-6, 0.0)
    return Problem(u.unsqueeze(-1), u, dense, 0.94, 1e-6, cliff=cliff, z=z)


def square() -> Problem:
    axis = torch.linspace(0.1, 3.0, 7, dtype=torch.float64)
    candidates = torch.cartesian_prod(axis, axis)
    dense = Observation(torch.zeros(2), 0.95, 1e-6, 0.0)
    return Problem(candidates, candidates.sum(-1), dense, 0.94, 1e-6, cliff=False)


def evaluate(problem: Problem, index: int, cliff: float = 2.0) -> Observation:
    point = problem.candidates[index]
    worst = float(point.max())
    metric = 0.95 - 0.01 * (worst / cliff) ** 6
    return Observation(point, max(metric, 0.1), 1e-6, float(problem.utility[index]))


def diverge(problem: Problem, index: int) -> Observation:
    return Observation(problem.candidates[index], None, 1e-6, None, diverged=True)


@pytest.fixture(params=NAMES)
def strategy(request: pytest.FixtureRequest) -> Strategy:
    return make_strategy(request.param)


def test_never_repeats_until_all_is_done(strategy: Strategy) -> None:
    problem = line(count=9)
    history: list[Observation] = []
    chosen: list[int] = []
    for trial in range(9):
        (index,) = strategy.propose(problem, history, None, q=1, seed=trial)
        chosen.append(index)
        history.append(evaluate(problem, index))
    assert sorted(chosen) == list(range(9))
    assert strategy.propose(problem, history, None, q=1, seed=9) == []


@pytest.mark.parametrize("finished", [0, 1, 4])
def test_is_deterministic_and_stateless(strategy: Strategy, finished: int) -> None:
    problem = line()
    history = [evaluate(problem, index) for index in (20, 10, 30, 25)[:finished]]
    torch.manual_seed(1)
    first = strategy.propose(problem, history, None, q=2, seed=7)
    strategy.propose(line(12), [], None, q=3, seed=1)
    torch.manual_seed(2)
    assert strategy.propose(problem, history, None, q=2, seed=7) == first


@pytest.mark.parametrize("finished", [0, 3])
def test_respects_pending_in_a_batch(strategy: Strategy, finished: int) -> None:
    problem = line()
    done = [20, 10, 30][:finished]
    busy = [15, 22]
    chosen = strategy.propose(
        problem, [evaluate(problem, i) for i in done], problem.candidates[busy], q=4, seed=0
    )
    assert len(set(chosen)) == 4
    assert not set(chosen) & {*done, *busy}
    assert all(0 <= index < 40 for index in chosen)


def test_gives_what_is_left(strategy: Strategy) -> None:
    problem = line(count=5)
    history = [evaluate(problem, index) for index in (0, 2)]
    chosen = strategy.propose(problem, history, problem.candidates[[4]], q=10, seed=0)
    assert sorted(chosen) == [1, 3]


def test_survives_nothing_but_divergence(strategy: Strategy) -> None:
    problem = line()
    history = [diverge(problem, index) for index in (39, 30, 20)]
    (index,) = strategy.propose(problem, history, None, q=1, seed=0)
    assert index not in (39, 30, 20)


@pytest.mark.parametrize("cliff", [True, False])
@pytest.mark.parametrize("diverged", [True, False])
def test_looks_for_feasibility_first(cliff: bool, diverged: bool) -> None:
    problem = line(cliff=cliff)
    strategy = KnownObjectiveStrategy()
    history: list[Observation] = []
    for trial in range(8):
        (index,) = strategy.propose(problem, history, None, q=1, seed=trial)
        good = bool(problem.candidates[index, 0] < 0.55)
        bad = diverge(problem, index) if diverged else evaluate(problem, index, cliff=0.5)
        history.append(evaluate(problem, index, cliff=1.0) if good else bad)
    best = best_feasible(history, problem.level)
    assert best is not None
    assert history[best].point.item() < 0.55


@pytest.mark.parametrize("name", ["condensa", "bisection"])
def test_nothing_feasible_drives_towards_the_dense_model(name: str) -> None:
    problem = line()
    history: list[Observation] = []
    for trial in range(8):
        (index,) = make_strategy(name).propose(problem, history, None, q=1, seed=trial)
        history.append(evaluate(problem, index, cliff=0.01))
    assert min(seen.point.item() for seen in history) < 0.35


def test_infeasible_baseline_makes_any_feasible_point_an_improvement() -> None:
    problem = replace(line(cliff=False), level=0.96)
    history = [evaluate(problem, index) for index in (20, 30)]
    (index,) = KnownObjectiveStrategy().propose(problem, history, None, q=1, seed=0)
    assert problem.candidates[index, 0] < problem.candidates[20, 0]


def test_reserve_when_nothing_can_improve() -> None:
    problem = line(count=6)
    history = [evaluate(problem, 5, cliff=10.0)]
    assert KnownObjectiveStrategy().propose(problem, history, None, q=2, seed=0) == [4, 3]


@pytest.mark.parametrize("q", [1, 3])
def test_default_works_in_two_dimensions(q: int) -> None:
    problem = square()
    strategy = KnownObjectiveStrategy()
    history: list[Observation] = []
    while len(history) < 15:
        chosen = strategy.propose(problem, history, None, q=q, seed=len(history))
        assert len(chosen) == q
        history += [evaluate(problem, index) for index in chosen]
    assert len({tuple(seen.point.tolist()) for seen in history}) == 15
    feasible = [problem.utility[i] for i in range(49) if evaluate(problem, i).feasible(0.94)]
    best = best_feasible(history, problem.level)
    assert best is not None and history[best].utility == pytest.approx(float(max(feasible)))


def test_grid_in_two_dimensions_covers_the_corners() -> None:
    problem = square()
    chosen = make_strategy("grid", points=4).propose(problem, [], None, q=4, seed=0)
    assert {tuple(p) for p in problem.candidates[chosen].tolist()} == {
        (0.1, 0.1), (0.1, 3.0), (3.0, 0.1), (3.0, 3.0)
    }  # fmt: skip


@pytest.mark.parametrize("name", ["paper", "bisection"])
def test_one_dimensional_methods_say_so(name: str) -> None:
    with pytest.raises(ValueError, match="needs one coordinate, got 2"):
        make_strategy(name).propose(square(), [], None, q=1, seed=0)


def test_bisection_halves_and_splits_evenly() -> None:
    problem = line(count=40)  # u = 0.1, 0.2, ..., 4.0
    bisection = make_strategy("bisection")

    def u(chosen: list[int]) -> Tensor:
        return problem.candidates[chosen, 0]

    assert u(bisection.propose(problem, [], None, 1, 0)).item() == pytest.approx(2.0)
    batch = u(bisection.propose(problem, [], None, 3, 0)).sort().values
    assert batch.tolist() == pytest.approx([1.0, 2.0, 3.0])
    history = [evaluate(problem, 19), evaluate(problem, 29)]  # 2.0 holds, 3.0 does not
    assert u(bisection.propose(problem, history, None, 1, 0)).item() == pytest.approx(2.5)


def test_paper_restricts_the_second_step_to_its_level_set() -> None:
    problem = line()
    bumpy = replace(problem, utility=problem.utility + 0.5 * (9 * problem.utility).sin())
    history = [evaluate(bumpy, index) for index in (2, 10, 16, 20, 25, 38)]
    (index,) = PaperStrategy(level_set_trials=6).propose(bumpy, history, None, 1, 0)
    assert bumpy.candidates[index, 0] < 2.6  # between 2.1 and 2.6 the level is crossed
    assert PaperStrategy(level_set_trials=9).propose(bumpy, history, None, 1, 0) != [index]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("annealing", {}, ValueError, "strategy must be one of .*'condensa'.* got 'annealing'"),
        ("grid", {"points": 1}, ValueError, "points must be at least 2"),
        ("paper", {"gamma": 2.0}, ValueError, "gamma must be in"),
        ("paper", {"initial": 0}, ValueError, "initial must be in"),
        ("paper", {"beta": -1.0}, ValueError, "beta must be >= 0"),
        ("grid", {"levels": 3}, TypeError, "levels"),
    ],
)
def test_wrong_options_are_refused(
    name: str, options: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_strategy(name, **options)


def test_wrong_calls_are_refused(strategy: Strategy) -> None:
    problem = line()
    with pytest.raises(ValueError, match="q must be at least 1"):
        strategy.propose(problem, [], None, q=0, seed=0)
    with pytest.raises(ValueError, match="pending must have shape"):
        strategy.propose(problem, [], torch.zeros(2, 3), q=1, seed=0)
    with pytest.raises(ValueError, match="history must hold points of 1"):
        strategy.propose(problem, [evaluate(square(), 0)], None, q=1, seed=0)


def regret(strategy: Strategy, case: SyntheticCliff, budget: int) -> float:
    problem = case.problem()
    history: list[Observation] = []
    for trial in range(budget):
        (index,) = strategy.propose(problem, history, None, q=1, seed=trial)
        history.append(case.observe(index))
    best = best_feasible(history, problem.level)
    return case.optimum - (0.0 if best is None else problem.utility_of(history[best]))


def test_default_beats_the_paper_and_chance() -> None:
    cases = [SyntheticCliff.draw(seed) for seed in range(6)]
    ours, paper, chance = (
        statistics.fmean(regret(make_strategy(name), case, budget=6) for case in cases)
        for name in ("condensa", "paper", "random")
    )
    assert ours < 0.1
    assert ours < paper - 0.05
    assert ours < chance - 0.2
