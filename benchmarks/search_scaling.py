"""What a search costs beyond its trials, and how it scales with workers.

Run ``python benchmarks/search_scaling.py --seconds 20``. Trials sleep, so that two cores suffice
for any number of workers. Efficiency is that of the whole ``fit``, with workers that have started:
the sleep of all trials, divided by workers and by the time that ``fit`` took; and against ``fit``
on one worker.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_results
from known_cliff import search, start

from lightning_condensa.search import ProcessPool, SearchResult
from lightning_condensa.search.strategies import make_strategy
from lightning_condensa.search.synthetic import SyntheticCliff


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


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="that each fit sleeps")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    payload: dict[str, Any] = {
        "proposal at 50 observations": proposing(50, 5),
        "a trial beyond its training": beyond_fit(6),
    }
    print(payload, flush=True)
    rows = []
    for workers in options.workers:
        rows.append(scaling(workers, options.trials, options.seconds))
        rows[-1]["against the first row"] = (
            rows[0]["fit"] * rows[0]["workers"] / rows[-1]["fit"] / workers
        )
        print(rows[-1], flush=True)
    write_results("search_scaling", {**payload, "rows": rows}, options.results)


if __name__ == "__main__":
    main()
