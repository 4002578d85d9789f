"""``preset="paper"`` beside the reference package: same weights, same batches, step by step.

    python benchmarks/paper.py

On the digits CNN, with the schedule that `tune.py` chose for the reference. Of the first θ after
training: how many weights only one of the two keeps. Of the last: the test accuracies, which agree
within seed noise only: the trajectories part at the first rounding that differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from common import RESULTS, mean_sd, read_results, silence, write_results
from gradual import prunable
from peers import REFERENCE_TUNING, PaperModule, fit_batches, optimizer_steps
from reference import Schedule, compress_batches
from tasks import TASKS, Start, TaskModule, dense_start
from torch import Tensor

from lightning_condensa import CondensaCallback, Prune

Batch = tuple[Tensor, Tensor]
TASK = "digits-cnn"


class Stream:
    """Batches one after the other, however often they are asked for anew."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = iter(batches)

    def __iter__(self) -> Iterator[Batch]:
        """Go on where the last pass was left."""
        return self._batches


def batches_of(start: Start, count: int) -> list[Batch]:
    """The first batches of a seed's order, epoch after epoch."""
    loader = start.data().train_dataloader()
    batches: list[Batch] = []
    epoch = 0
    while len(batches) < count:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches += [(x, y) for x, y in loader]
        epoch += 1
    return batches[:count]


def both(start: Start, density: float, schedule: Schedule, budget: int) -> list[TaskModule]:
    """θ of the reference package, and of this package's preset."""
    batches = batches_of(start, budget)
    theirs = compress_batches(start, density, schedule, budget, Stream(batches))
    total = sum(w.numel() for w in prunable(theirs))
    # The package rounds down, and lets a layer die.
    scheme = Prune(int(density * total) / total, min_per_layer=0)
    preset = CondensaCallback(scheme, preset="paper", schedule=schedule.callback_arguments(budget))
    ours = fit_batches(PaperModule(start, schedule), [preset], batches)
    return [theirs, ours]


def support(module: TaskModule) -> Tensor:
    """Which of the weights that can be pruned are not zero, flat."""
    return torch.cat([(w != 0).flatten() for w in prunable(module)])


def first_theta(start: Start, density: float, schedule: Schedule, budget: int) -> int:
    """Weights that only one of the two keeps at the first C-step after training."""
    l_step = schedule.iterations(budget)["mb_iterations_first_l"]
    theirs, ours = both(start, density, replace(schedule, steps=2), l_step)
    return int((support(theirs) != support(ours)).sum())


def compare(seed: int, density: float, schedule: Schedule) -> dict[str, Any]:
    """One seed at one density."""
    start = dense_start(TASKS[TASK], seed, None)
    budget = optimizer_steps(start, start.task.epochs)
    thetas = both(start, density, schedule, budget)
    theirs, ours = (start.task.measure(theta, start.splits.test) for theta in thetas)
    row = {
        "seed": seed,
        "density": density,
        "kept": int(support(thetas[1]).sum()),
        "first_theta_differs_in": first_theta(start, density, schedule, budget),
        "reference": theirs,
        "paper": ours,
    }
    print(row, flush=True)
    return row


def main() -> None:
    """Compare and write ``results/paper.json``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.01, 0.005, 0.002])
    args = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    schedule = Schedule(**read_results(REFERENCE_TUNING)[TASK]["chosen"])
    rows = [compare(seed, d, schedule) for d in args.densities for seed in args.seeds]
    summary = [
        {
            "density": d,
            "differs_in": max(r["first_theta_differs_in"] for r in rows if r["density"] == d),
            "kept": next(r["kept"] for r in rows if r["density"] == d),
            **{
                engine: mean_sd([r[engine] for r in rows if r["density"] == d])
                for engine in ("reference", "paper")
            },
        }
        for d in args.densities
    ]
    write_results("paper", {"task": TASK, "summary": summary, "rows": rows}, RESULTS)


if __name__ == "__main__":
    main()
