"""What a search costs beyond its trials, and how it scales with workers.

Run ``python benchmarks/search_scaling.py --seconds 20``. Trials sleep, so that two cores suffice
for any number of workers. Efficiency is that of the whole ``fit``, with workers that have started:
the sleep of all trials, divided by workers and by the time that ``fit`` took; and against ``fit``
on one worker.

What several trials at a time cost in quality, because the next one is proposed before the last ones
have ended, is measured on the synthetic cliffs of ``search_1d.py``: trials that all take the same
time, one after the other and four at a time, 12 in all. Each part is written when it is done.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any, Literal

import torch
from common import RESULTS, environment, mean_sd, update_results
from known_cliff import search, start

from lightning_condensa.search import ProcessPool, SearchResult
from lightning_condensa.search.problem import Observation, best_feasible
from lightning_condensa.search.strategies import make_strategy
from lightning_condensa.search.synthetic import SyntheticCliff

PARTS = ("cost", "workers", "parallel")


def scaling(workers: int, trials: int, seconds: float) -> dict[str, Any]:
    """Run a search on some workers."""
    module, data = start(seconds)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        with ProcessPool(workers, threads=1) as pool:
            wait([pool.submit(time.sleep, 1.0) for _ in range(workers)])
            ready = time.monotonic()
            task = search(Path(folder), max_trials=trials, executor=pool)
            result: SearchResult = task.fit(module, **data)
            ended = time.monotonic()
    beyond = [t.seconds - seconds for t in result.trials]
    return {
        "workers": workers,
        "trials": len(result.trials),
        "seconds a trial": seconds,
        "start of the workers": ready - began,
        "fit": ended - ready,
        "efficiency": trials * seconds / workers / (ended - ready),
        "beyond the sleep, first trial of a worker": max(beyond),
        "beyond the sleep, median": statistics.median(beyond),
        "load": os.getloadavg()[0],
        "states": sorted({t.state for t in result.trials}),
    }


def beyond_fit(trials: int) -> dict[str, float]:
    """Seconds of a trial in this process outside the training loop itself, and of its parts."""
    module, data = start(0.0)
    with tempfile.TemporaryDirectory() as folder:
        task = search(Path(folder), max_trials=trials)
        result = task.fit(module, **data)
    later = [t.seconds for t in result.trials[1:]]
    return {"first trial": result.trials[0].seconds, "later trials": statistics.median(later)}


def proposing(observations: int, repeats: int) -> dict[str, float]:
    """Seconds to propose the next density after some observations."""
    times = []
    strategy = make_strategy("auto")
    for seed in range(repeats):
        case = SyntheticCliff.draw(seed)
        problem = case.problem()
        last = len(problem.candidates) - 1
        picked = torch.linspace(0, last, observations).round().int().unique()
        history = [case.observe(int(i)) for i in picked]
        began = time.monotonic()
        strategy.propose(problem, history, None, q=1, seed=seed)
        times.append(time.monotonic() - began)
    return {"median": statistics.median(times), "max": max(times)}


def parallel_regret(
    objective: Literal["memory", "throughput"], q: int, trials: int, problems: int
) -> dict[str, Any]:
    """Regret with ``q`` trials in flight, of which the oldest always ends first."""
    regret, infeasible = [], 0
    strategy = make_strategy("auto")
    for seed in range(problems):
        case = SyntheticCliff.draw(seed, objective)
        problem = case.problem()
        ended: list[int] = []
        flying: list[int] = []
        for trial in range(trials):
            if len(flying) == q:
                ended.append(flying.pop(0))
            history: list[Observation] = [case.observe(index) for index in ended]
            pending = problem.candidates[flying] if flying else None
            flying += strategy.propose(problem, history, pending, q=1, seed=1000 * seed + trial)
        chosen = [*ended, *flying]
        best = best_feasible([case.observe(index) for index in chosen], problem.level)
        winner = None if best is None else chosen[best]
        regret.append(case.optimum - (0.0 if winner is None else float(case.utility[winner])))
        infeasible += winner is not None and float(case.accuracy[winner]) < problem.level
    return {
        "objective": objective,
        "at a time": q,
        "trials": trials,
        "problems": problems,
        "regret": mean_sd(regret),
        "infeasible": infeasible / problems,
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="that each fit sleeps")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--problems", type=int, default=50, help="for each objective")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)

    def write(name: str, value: object) -> None:
        print(name, value, flush=True)
        found = {"environment": environment(), name: value}
        update_results("search_scaling", lambda results: results.update(found), options.results)

    if "cost" in options.parts:
        write("proposal at 50 observations", proposing(50, 5))
        write("a trial beyond its training", beyond_fit(6))
    if "workers" in options.parts:
        rows: list[dict[str, Any]] = []
        for workers in options.workers:
            row = scaling(workers, options.trials, options.seconds)
            rows.append(row)
            row["against the first row"] = (
                rows[0]["fit"] * rows[0]["workers"] / row["fit"] / workers
            )
        write("rows", rows)
    if "parallel" in options.parts:
        kinds: list[Literal["memory", "throughput"]] = ["memory", "throughput"]
        regrets = [parallel_regret(k, q, 12, options.problems) for k in kinds for q in (1, 4)]
        write("parallel", regrets)


if __name__ == "__main__":
    main()
