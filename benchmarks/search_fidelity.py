"""Search along one density with cheap trials: regret against what training has cost.

    python benchmarks/search_fidelity.py
    python benchmarks/search_fidelity.py --fidelities 1 0.25 --problems 12

The problems are those of ``search_1d.py``, with a cliff that less training leaves nearer to the
dense model; the search does not know by how much, and the law of it is none that its surrogate has.
In every sixth problem less training misleads: the cliff is several times nearer. A trial costs its
share of a training, and only full ones can win. Regret is that of the winner when so many trainings
are spent. Each row is written when it is done, and not run again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, Literal

import torch
from common import RESULTS, environment, read_results, update_results
from search_1d import FAMILIES, OBJECTIVES, score, summarize, together

from lightning_condensa.search.problem import Observation
from lightning_condensa.search.strategies import make_strategy
from lightning_condensa.search.synthetic import SyntheticCliff

NAME = "search_fidelity"
#: Trainings spent.
BUDGETS = (2, 3, 5, 10)
#: Every so many problems less training misleads.
MISLEADING = 6


def trials(case: SyntheticCliff, seed: int, z: float) -> list[int]:
    """What the default strategy evaluates until ten trainings are spent."""
    strategy, problem = make_strategy("condensa"), case.problem(z)
    history: list[Observation] = []
    chosen: list[int] = []
    left = float(max(BUDGETS))
    while left >= 1:
        affordable = problem.affordable(left)
        point = strategy.suggest(affordable, history, None, q=1, seed=1000 * seed + len(chosen))
        index = int(problem.nearest(point)[0])
        chosen.append(index)
        history.append(case.observe(index))
        left -= float(problem.cost[index])
    return chosen


def full_within(case: SyntheticCliff, chosen: list[int], budget: float) -> list[int]:
    """The full trials among the first ones that a budget pays for."""
    cost = case.problem().cost[chosen]
    paid = int((cost.cumsum(0) <= budget + 1e-9).sum())
    return [index for index, own in zip(chosen[:paid], cost[:paid], strict=True) if own == 1]


def compare(
    objective: Literal["memory", "throughput"], fidelity: float, z: float, problems: int
) -> dict[str, Any]:
    """Run one least share of the training on all problems of one objective."""
    started, evaluations = time.process_time(), 0
    scores: dict[int, list[tuple[float, float]]] = {budget: [] for budget in BUDGETS}
    for seed in range(problems):
        case = SyntheticCliff.draw(
            seed, objective, FAMILIES[seed % len(FAMILIES)], fidelity, misleads(seed)
        )
        problem, chosen = case.problem(z), trials(case, seed, z)
        evaluations += len(chosen)
        for budget in BUDGETS:
            found = score(case, problem, full_within(case, chosen, budget), together, seed)
            scores[budget].append(found)
    row: dict[str, Any] = {
        "objective": objective,
        "fidelity": fidelity,
        "z": z,
        "problems": problems,
        "trials": evaluations / problems,
        "cpu_seconds_per_trial": (time.process_time() - started) / evaluations,
    }
    for budget in BUDGETS:
        own = scores[budget]
        row[f"after_{budget}"] = {
            **summarize(own),
            "usual": summarize([s for i, s in enumerate(own) if not misleads(i)]),
            "misleading": summarize([s for i, s in enumerate(own) if misleads(i)]),
        }
    return row


def misleads(seed: int) -> bool:
    """Whether less training misleads in a problem."""
    return seed % MISLEADING == MISLEADING - 1


def main() -> None:
    """Compare what was asked for and is not there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=int, default=60, help="for each objective")
    parser.add_argument("--fidelities", nargs="+", type=float, default=[1.0, 0.25])
    parser.add_argument("--margins", nargs="+", type=float, default=[0.0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for z in options.margins:
        for fidelity in options.fidelities:
            for objective in OBJECTIVES:
                key = (objective, fidelity, z, options.problems)
                if key in map(_key, read_results(NAME, options.out).get("rows", [])):
                    continue
                row = compare(objective, fidelity, z, options.problems)

                def add(results: dict[str, Any], row: dict[str, Any] = row) -> None:
                    kept = [r for r in results.get("rows", []) if _key(r)[:3] != _key(row)[:3]]
                    results.update({"environment": environment(), "rows": [*kept, row]})

                update_results(NAME, add, options.out)
                print(show(row), flush=True)


def show(row: dict[str, Any]) -> str:
    """A row in a line."""
    figures = []
    for budget in BUDGETS:
        at = row[f"after_{budget}"]
        usual, misleading = at["usual"]["regret_mean"], at["misleading"]["regret_mean"]
        figures.append(f"@{budget} {usual:6.3f} {misleading:6.3f} ({at['infeasible_share']:4.0%})")
    return (
        f"{row['objective']:10} from {row['fidelity']:<5} z={row['z']:<4} {'  '.join(figures)}  "
        f"{row['trials']:.1f} trials, {row['cpu_seconds_per_trial']:.3f} s each"
    )


def _key(row: dict[str, Any]) -> tuple[str, float, float, int]:
    return row["objective"], row["fidelity"], row["z"], row["problems"]


if __name__ == "__main__":
    main()
