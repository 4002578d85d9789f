"""Search along one density: regret of each strategy on synthetic accuracy cliffs.

Run ``python benchmarks/search_1d.py --seeds 30``. Every method sees the same problems and the
same noise. Regret is ``ln(f*/f)`` of the winner, the evaluated point of greatest utility that was
seen to be feasible (the dense model while there is none); ``f*`` is the best truly feasible
candidate, so that luck with noise can make it negative.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import optuna
import torch
from common import write_results

from lightning_condensa.search.problem import Observation, Problem, best_feasible
from lightning_condensa.search.strategies import Strategy, make_strategy
from lightning_condensa.search.synthetic import SyntheticCliff

BUDGETS = (5, 10)
Run = Callable[[SyntheticCliff, int], "tuple[Problem, list[int]]"]


def with_strategy(strategy: Strategy, z: float = 0.0, cliff: bool = True) -> Run:
    """Evaluate the proposals of one of our strategies, one by one.

    Without ``cliff`` the default strategy is not told that the metric is an accuracy, and models
    it by its Gaussian process.
    """

    def run(case: SyntheticCliff, seed: int) -> tuple[Problem, list[int]]:
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

    def run(case: SyntheticCliff, seed: int) -> tuple[Problem, list[int]]:
        problem, chosen = case.problem(), []
        study = optuna.create_study(direction="maximize", sampler=make_sampler(seed))
        density = torch.exp(-case.candidates)
        low, high = float(density.min()), float(density.max())
        for _ in range(max(BUDGETS)):
            trial = study.ask()
            u = -torch.tensor([[trial.suggest_float("density", low, high, log=True)]]).log()
            index = int(problem.nearest(u))
            seen = case.observe(index)
            assert seen.metric is not None and seen.utility is not None
            trial.set_constraint("metric", problem.level - seen.metric)
            study.tell(trial, seen.utility)
            chosen.append(index)
        return problem, chosen

    return run


METHODS: dict[str, Run] = {
    "condensa": with_strategy(make_strategy("condensa")),
    "condensa z=1": with_strategy(make_strategy("condensa"), z=1.0),
    "condensa z=1.64": with_strategy(make_strategy("condensa"), z=1.64),
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
}


def score(case: SyntheticCliff, problem: Problem, chosen: Sequence[int]) -> tuple[float, float]:
    """Regret of the winner among ``chosen``, and by how much it truly misses the level."""
    history: list[Observation] = [case.observe(index) for index in chosen]
    best = best_feasible(history, problem.level, problem.z)
    if best is None:
        return case.optimum, 0.0
    winner = chosen[best]
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
    objective: Literal["memory", "throughput"], seeds: int, methods: Sequence[str]
) -> dict[str, Any]:
    """Run all methods on all problems of one objective."""
    table: dict[str, Any] = {}
    for name in methods:
        started = time.perf_counter()
        scores: dict[int, list[tuple[float, float]]] = {budget: [] for budget in BUDGETS}
        for seed in range(seeds):
            case = SyntheticCliff.draw(seed, objective)
            problem, chosen = METHODS[name](case, seed)
            for budget in BUDGETS:
                scores[budget].append(score(case, problem, chosen[:budget]))
        seconds = (time.perf_counter() - started) / (seeds * max(BUDGETS))
        table[name] = {f"after_{budget}": summarize(scores[budget]) for budget in BUDGETS}
        table[name]["seconds_per_trial"] = seconds
        five, ten = (table[name][f"after_{budget}"] for budget in BUDGETS)
        print(
            f"{objective:10} {name:22} "
            f"@5 {five['regret_mean']:6.3f} ± {five['regret_sd']:.3f}  "
            f"@10 {ten['regret_mean']:6.3f} ± {ten['regret_sd']:.3f}  "
            f"infeasible {ten['infeasible_share']:4.0%} by {ten['violation_points']:.2f} points  "
            f"{seconds:.3f} s per trial",
            flush=True,
        )
    return table


def main() -> None:
    """Compare and write ``benchmarks/results/search_1d.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=30, help="problems per objective")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    payload: dict[str, Any] = {
        "seeds": list(range(arguments.seeds)),
        "objectives": {
            objective: compare(objective, arguments.seeds, arguments.methods)
            for objective in ("memory", "throughput")
        },
    }
    print(write_results("search_1d", payload))


if __name__ == "__main__":
    main()
