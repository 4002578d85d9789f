"""Search along one density: regret of each strategy on synthetic accuracy cliffs.

    python benchmarks/search_1d.py
    python benchmarks/search_1d.py --methods condensa bisection --margins 0 --problems 20

Every method sees the same problems and the same noise; every fifth problem is of a family that the
surrogate was not made for. Regret is ``ln(f*/f)`` of the winner, the evaluated point of greatest
utility that was seen to be feasible (the dense model while there is none); ``f*`` is the best truly
feasible candidate, so that luck with noise can make it negative. With a margin of z standard
deviations a point counts as feasible only so far above the level, in the search and in the choice
of the winner: every method is run with every margin, so that they can be compared at equal risk.
The default strategy takes a margin for a confidence: a point is feasible where all points together
say so with that probability.
Each method with each margin is written when it is done, and not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import optuna
import torch
from ax_search import AxLoop, available
from common import RESULTS, environment_index, read_results, update_results

from lightning_condensa.search.feasibility import feasible_ones
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.strategies import (
    KnownObjectiveStrategy,
    Strategy,
    make_strategy,
)
from lightning_condensa.search.synthetic import Family, SyntheticCliff

NAME = "search_1d"
BUDGETS = (3, 5, 10)
MARGINS = (0.0, 1.0, 1.64)
OBJECTIVES: tuple[Literal["memory", "throughput"], ...] = ("memory", "throughput")
#: The last is the one that the surrogate was not made for.
FAMILIES: tuple[Family, ...] = get_args(Family)
Run = Callable[[SyntheticCliff, int, float], "tuple[Problem, list[int]]"]
#: Which of some observations count as feasible.
Judge = Callable[[Problem, Sequence[Observation], int], list[bool]]


def with_strategy(strategy: Strategy, cliff: bool = True) -> Run:
    """Evaluate the proposals of one of our strategies, one by one.

    Without ``cliff`` the default strategy is not told that the metric is an accuracy, and models
    it by its Gaussian process.
    """

    def run(case: SyntheticCliff, seed: int, z: float) -> tuple[Problem, list[int]]:
        problem = replace(case.problem(z), cliff=cliff)
        history: list[Observation] = []
        chosen: list[int] = []
        for trial in range(max(BUDGETS)):
            index = strategy.propose(problem, history, None, q=1, seed=1000 * seed + trial)[0]
            chosen.append(index)
            history.append(case.observe(index))
        return problem, chosen

    return run


def with_optuna(make_sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Run:
    """Let Optuna suggest a density on a log scale, with the accuracy as a constraint."""

    def run(case: SyntheticCliff, seed: int, z: float) -> tuple[Problem, list[int]]:
        problem, chosen = case.problem(z), []
        study = optuna.create_study(direction="maximize", sampler=make_sampler(seed))
        density = torch.exp(-case.candidates)
        low, high = float(density.min()), float(density.max())
        for _ in range(max(BUDGETS)):
            trial = study.ask()
            u = -torch.tensor([[trial.suggest_float("density", low, high, log=True)]]).log()
            index = int(problem.nearest(u))
            seen = case.observe(index)
            assert seen.metric is not None and seen.utility is not None
            trial.set_constraint("metric", problem.target - seen.metric)
            study.tell(trial, seen.utility)
            chosen.append(index)
        return problem, chosen

    return run


def with_ax(case: SyntheticCliff, seed: int, z: float) -> tuple[Problem, list[int]]:
    """Let Ax suggest u = −ln(density); the margin is one on its constraint."""
    problem, chosen = case.problem(z), []
    ends = (float(case.candidates.min()), float(case.candidates.max()))
    loop = AxLoop({"u": ends}, {}, problem.target, seed)
    loop.begin({"u": ends[0]}, problem.baseline)
    for _ in range(max(BUDGETS)):
        trial, parameters = loop.ask()
        index = int(problem.nearest(torch.tensor([[parameters["u"]]])))
        loop.tell(trial, case.observe(index))
        chosen.append(index)
    return problem, chosen


def by_margin(problem: Problem, history: Sequence[Observation], seed: int) -> list[bool]:
    """Each by its own measurement."""
    return [seen.feasible(problem.level, problem.z) for seen in history]


def together(problem: Problem, history: Sequence[Observation], seed: int) -> list[bool]:
    """By what the default's surrogate says after all of them."""
    model = KnownObjectiveStrategy().surrogate(problem, history, seed)
    return feasible_ones(problem, history, model)


METHODS: dict[str, Run] = {
    "condensa": with_strategy(make_strategy("condensa")),
    "condensa, bi-log GP": with_strategy(make_strategy("condensa"), cliff=False),
    "paper": with_strategy(make_strategy("paper")),
    "bisection": with_strategy(make_strategy("bisection")),
    "random": with_strategy(make_strategy("random")),
    "grid": with_strategy(make_strategy("grid", points=max(BUDGETS))),
    "optuna GP": with_optuna(lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "optuna GP, 3 start-up": with_optuna(
        lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=3)
    ),
    "optuna TPE": with_optuna(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "optuna TPE, 3 start-up": with_optuna(
        lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=3)
    ),
    "Ax": with_ax,
}


JUDGES: dict[str, Judge] = {"condensa": together}


def score(
    case: SyntheticCliff, problem: Problem, chosen: Sequence[int], judge: Judge, seed: int
) -> tuple[float, float]:
    """Regret of the winner among ``chosen``, and by how much it truly misses the level."""
    good = judge(problem, [case.observe(index) for index in chosen], seed)
    feasible = [index for index, kept in zip(chosen, good, strict=True) if kept]
    if not feasible:
        return case.optimum, 0.0
    winner = max(feasible, key=lambda index: float(case.utility[index]))
    missed = max(0.0, problem.level - float(case.accuracy[winner]))
    return case.optimum - float(case.utility[winner]), missed


def summarize(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean and spread over problems; the violation, in points, over infeasible winners."""
    regret = [value for value, _ in scores]
    missed = [100 * value for _, value in scores if value > 0]
    return {
        "regret_mean": statistics.fmean(regret),
        "regret_sd": statistics.stdev(regret) if len(regret) > 1 else 0.0,
        "regret_median": statistics.median(regret),
        "infeasible_share": len(missed) / len(scores),
        "violation_points": statistics.fmean(missed) if missed else 0.0,
    }


def compare(
    objective: Literal["memory", "throughput"], name: str, z: float, problems: int
) -> dict[str, Any]:
    """Run one method with one margin on all problems of one objective."""
    started = time.process_time()
    scores: dict[int, list[tuple[float, float]]] = {budget: [] for budget in BUDGETS}
    for seed in range(problems):
        case = SyntheticCliff.draw(seed, objective, FAMILIES[seed % len(FAMILIES)])
        problem, chosen = METHODS[name](case, seed, z)
        for budget in BUDGETS:
            found = score(case, problem, chosen[:budget], JUDGES.get(name, by_margin), seed)
            scores[budget].append(found)
    seconds = (time.process_time() - started) / (problems * max(BUDGETS))
    row: dict[str, Any] = {"objective": objective, "method": name, "z": z, "problems": problems}
    for budget in BUDGETS:
        row[f"after_{budget}"] = summarize(scores[budget])
        unseen = scores[budget][len(FAMILIES) - 1 :: len(FAMILIES)]
        row[f"after_{budget}"]["unseen_family"] = summarize(unseen) if unseen else None
    return {**row, "cpu_seconds_per_trial": seconds}


def show(row: dict[str, Any]) -> str:
    """A row in a line."""
    figures = "  ".join(
        f"@{budget} {row[f'after_{budget}']['regret_mean']:6.3f}"
        f" ({row[f'after_{budget}']['infeasible_share']:4.0%})"
        for budget in BUDGETS
    )
    return (
        f"{row['objective']:10} {row['method']:22} z={row['z']:<4} {figures}  "
        f"{row['cpu_seconds_per_trial']:.3f} s"
    )


def main() -> None:
    """Compare what was asked for and is not there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=int, default=100, help="for each objective")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=available(METHODS))
    parser.add_argument("--margins", nargs="+", type=float, default=list(MARGINS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    for z in options.margins:
        for objective in OBJECTIVES:
            for name in options.methods:
                key = (objective, name, z, options.problems)
                rows = read_results(NAME, options.out).get("rows", [])
                if key in map(_key, rows):
                    continue
                row = compare(objective, name, z, options.problems)

                def add(results: dict[str, Any], row: dict[str, Any] = row) -> None:
                    kept = [r for r in results.get("rows", []) if _key(r)[:3] != _key(row)[:3]]
                    row["environment"] = environment_index(results)
                    results["rows"] = [*kept, row]

                update_results(NAME, add, options.out)
                print(show(row), flush=True)


def _key(row: dict[str, Any]) -> tuple[str, str, float, int]:
    return row["objective"], row["method"], row["z"], row["problems"]


if __name__ == "__main__":
    main()
