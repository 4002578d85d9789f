"""Chooses the settings of each method for each task.

    python benchmarks/tune.py --methods gradual reference --tasks cifar-vgg --data DATA

The learning rate of all; of gradual pruning also the share of the run in which the density falls.
The published algorithm's learning rate, μ, number of L-steps and optimizer are chosen one after
another, by the reference package, or by this package's ``preset="paper"`` where that cannot prune
the network. One-shot pruning and `ModelPruning` take gradual pruning's settings, and what is
distilled those of the method itself.

Settings are judged by the validation metric of the last θ, mean over the task's densities, on one
seed at budget S. Every trial is recorded, and none is repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, read_results, silence, update_results
from peers import (
    GRADUAL_TUNING,
    OURS_TUNING,
    REFERENCE_TUNING,
    at_rate,
    compressed,
    optimizer_steps,
    pruned,
    published,
)
from reference import Schedule, compress, covers
from tasks import TASKS, Start, TaskModule, dense_start

Settings = dict[str, Any]
RAMPS = (0.2, 0.4, 0.7)
RATES = (1, 0.3, 3)  # times the task's


class Tuner:
    """Compares settings by the mean validation metric and records every trial.

    Args:
        name: Of the result file.
        start: The dense network.
        run: Compresses it to a density with some settings.
        engine: What runs, for the record.
        folder: Of the result file.
    """

    def __init__(
        self,
        name: str,
        start: Start,
        run: Callable[[float, Settings], TaskModule],
        engine: str,
        folder: Path,
    ) -> None:
        self.name = name
        self.start = start
        self.run = run
        self.engine = engine
        self.folder = folder
        known = read_results(name, folder).get(start.task.name, {})
        self.trials: list[dict[str, Any]] = known.get("trials", [])

    def score(self, settings: Settings) -> float:
        """Return the mean validation metric over the densities; more is better."""
        task = self.start.task
        found = next((t["val"] for t in self.trials if t["settings"] == settings), None)
        if found is None:
            thetas = (self.run(density, settings) for density in task.densities)
            found = [task.measure(theta, self.start.splits.val) for theta in thetas]
            self.trials.append({"settings": settings, "val": found})
            update_results(self.name, self._record, self.folder)
            print(task.name, settings, found, flush=True)
        mean: float = sum(found) / len(found)
        return mean if task.mode == "max" else -mean

    def best(self) -> Settings:
        """Return the best settings tried so far; the first of equals."""
        best: Settings = max((t["settings"] for t in self.trials), key=self.score)
        return best

    def _record(self, results: dict[str, Any]) -> None:
        task = self.start.task
        results[task.name] = {
            "environment": environment(),
            "engine": self.engine,
            "seed": self.start.seed,
            "optimizer_steps": optimizer_steps(self.start, task.epochs),
            "densities": task.densities,
            "criterion": f"mean validation {task.metric} of the last θ over the densities",
            "chosen": self.best(),
            "trials": self.trials,
        }


def tune_ours(start: Start, folder: Path) -> Settings:
    """Choose the learning rate of L-C."""

    def run(density: float, settings: Settings) -> TaskModule:
        return compressed(at_rate(start, settings["lr"]), density, start.task.epochs)

    tuner = Tuner(OURS_TUNING, start, run, "ours", folder)
    tune_rate(tuner)
    return tuner.best()


def tune_gradual(start: Start, folder: Path) -> Settings:
    """Choose the ramp of gradual pruning, then its learning rate."""

    def run(density: float, settings: Settings) -> TaskModule:
        start_at = at_rate(start, settings["lr"])
        return pruned(start_at, density, start.task.epochs, settings["ramp"])

    tuner = Tuner(GRADUAL_TUNING, start, run, "gradual", folder)
    for ramp in RAMPS:
        tuner.score({"ramp": ramp, "lr": start.task.lr})
    tune_rate(tuner, tuner.best())
    return tuner.best()


def tune_rate(tuner: Tuner, settings: Settings | None = None) -> None:
    """Try the task's learning rate, less and more, and on while more is better."""
    lr = tuner.start.task.lr
    for factor in RATES:
        tuner.score({**(settings or {}), "lr": factor * lr})
    if tuner.best()["lr"] > lr:
        tuner.score({**(settings or {}), "lr": 10 * lr})


def tune_reference(start: Start, folder: Path) -> Settings:
    """Choose the published algorithm's schedule: at most 8 trials."""
    task = start.task
    engine = "reference" if covers(start.module()) else "paper"

    def run(density: float, settings: Settings) -> TaskModule:
        schedule = Schedule(**settings)
        if engine == "paper":
            return published(start, density, task.epochs, schedule)
        return compress(start, density, schedule, optimizer_steps(start, task.epochs))

    tuner = Tuner(REFERENCE_TUNING, start, run, engine, folder)

    def attempt(schedule: Schedule, **changes: Any) -> None:
        tuner.score(asdict(replace(schedule, **changes)))

    def best() -> Schedule:
        return Schedule(**tuner.best())

    base = Schedule(weight_decay=task.weight_decay)
    if task.optimizer == "adamw":  # its decay is decoupled, and next to nothing as an L2 penalty
        base = Schedule(optimizer="adam", weight_decay=0.0)
    for factor in RATES:
        attempt(base, lr=factor * task.lr, lr_end=factor * task.lr / 10)
    old = best()
    for factor in (0.1, 10):
        attempt(old, mu_init=factor * old.mu_init)
    new = best()
    if new != old:  # one more in the direction that helped
        attempt(new, mu_init=new.mu_init**2 / old.mu_init)
    new = best()
    growth = new.mu_multiplier ** ((new.steps - 2) / (40 - 2))  # to the same final μ
    attempt(new, steps=40, mu_multiplier=growth)
    if base.optimizer == "adam":
        attempt(best(), optimizer="sgd", lr=0.05, lr_end=0.005, weight_decay=5e-4)
    return tuner.best()


TUNERS = {"ours": tune_ours, "gradual": tune_gradual, "reference": tune_reference}


def main() -> None:
    """Tune some methods on some tasks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=TUNERS, default=list(TUNERS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder of cifar10/ and tinyshakespeare/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    for method in options.methods:
        for name in options.tasks:
            start = dense_start(TASKS[name], options.seed, options.data)
            print("chosen:", method, name, TUNERS[method](start, options.out), flush=True)


if __name__ == "__main__":
    main()
