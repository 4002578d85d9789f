"""Accuracy of compressed digits networks at equal optimizer steps, method by method.

Every method starts from the same dense weights, sees batches of 64 for the same number of
optimizer steps (1,536 by default) and is judged by the test accuracy of what it ships, θ.
Methods can be run one by one, in different environments, into one result file::

    python benchmarks/lc_quality.py --methods ours paper gradual gradual-distilled
    python benchmarks/lc_quality.py --methods reference --merge

The dense networks are trained once and kept in a scratch folder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import RESULTS, environment, mean_sd, read_results, write_results
from digits import (
    QUIET,
    STEPS_PER_EPOCH,
    DigitsCNN,
    Start,
    accuracy,
    add_task_arguments,
    dense_start,
    density,
    silence,
)
from gradual import DistilledCNN, GradualPruning
from reference import compress, tuned_schedule

NAME = "lc_quality_digits"
LR = 0.05

Method = Callable[[Start, float, int], DigitsCNN]


class PaperCNN(DigitsCNN):
    """The digits network under plain Nesterov SGD: the L-C callback drives the learning rate."""

    def configure_optimizers(self) -> torch.optim.Optimizer:  # type: ignore[override]
        """Return the optimizer of the network without its cosine."""
        return torch.optim.SGD(
            self.parameters(),
            lr=self.hparams["lr"],
            momentum=self.hparams["momentum"],
            weight_decay=self.hparams["weight_decay"],
            nesterov=True,
        )


def fit(model: DigitsCNN, start: Start, callback: pl.Callback, steps: int) -> DigitsCNN:
    """Run a compressing callback for a number of optimizer steps."""
    model.load_state_dict(start.weights)
    pl.seed_everything(start.seed, verbose=False)
    trainer = pl.Trainer(
        max_epochs=steps // STEPS_PER_EPOCH, callbacks=[callback], accelerator="cpu", **QUIET
    )
    trainer.fit(model, datamodule=start.data)
    if trainer.global_step != steps:
        raise RuntimeError(f"{trainer.global_step} optimizer steps, the budget is {steps}")
    return model


def ours(start: Start, target: float, steps: int) -> DigitsCNN:
    """L-C with this package's defaults."""
    from lightning_condensa import CondensaCallback, Prune

    callback = CondensaCallback(Prune(target), monitor="val_acc", mode="max")
    return fit(DigitsCNN(lr=LR), start, callback, steps)


def paper(start: Start, target: float, steps: int) -> DigitsCNN:
    """The published L-C through this package, on the schedule tuned for the reference."""
    from lightning_condensa import CondensaCallback, Prune

    schedule = tuned_schedule()
    callback = CondensaCallback(
        Prune(target),
        preset="paper",
        schedule=schedule.callback_arguments(steps),
        monitor="val_loss",
        mode="min",
    )
    model = PaperCNN(schedule.lr, schedule.momentum, schedule.weight_decay)
    return fit(model, start, callback, steps)


def reference(start: Start, target: float, steps: int) -> DigitsCNN:
    """The published L-C as the reference package implements it."""
    return compress(start, target, tuned_schedule(), steps)


def gradual(start: Start, target: float, steps: int) -> DigitsCNN:
    """Gradual magnitude pruning."""
    return fit(DigitsCNN(lr=LR), start, GradualPruning(target), steps)


def gradual_distilled(start: Start, target: float, steps: int) -> DigitsCNN:
    """Gradual magnitude pruning, taught by the dense network."""
    return fit(DistilledCNN(start.model(), lr=LR), start, GradualPruning(target), steps)


METHODS: dict[str, Method] = {
    "ours": ours,
    "paper": paper,
    "reference": reference,
    "gradual": gradual,
    "gradual-distilled": gradual_distilled,
}


def run_cell(method: Method, start: Start, target: float, steps: int) -> dict[str, Any]:
    """Compress once and measure θ."""
    begin = time.perf_counter()
    theta = method(start, target, steps)
    return {
        "seed": start.seed,
        "density": target,
        "test_acc": accuracy(theta, start.data.test),
        "val_acc": accuracy(theta, start.data.val),
        "measured_density": density(theta),
        "seconds": round(time.perf_counter() - begin, 2),
    }


def summarize(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation of the test accuracy, one row a density."""
    rows = []
    for target in sorted({cell["density"] for cell in cells}, reverse=True):
        scores = [cell["test_acc"] for cell in cells if cell["density"] == target]
        mean, sd = mean_sd(scores)
        rows.append({"density": target, "seeds": len(scores), "mean": mean, "sd": sd})
    return rows


def table(results: dict[str, Any]) -> str:
    """Render the summaries: methods down, densities across, percent."""
    mean, sd = mean_sd([cell["test_acc"] for cell in results["dense"]])
    lines = [f"dense: {100 * mean:.2f} ± {100 * sd:.2f} %"]
    for method, record in results["methods"].items():
        entries = [
            f"{100 * row['density']:g} %: {100 * row['mean']:6.2f} ± {100 * row['sd']:.2f}"
            for row in record["summary"]
        ]
        lines.append(f"{method:>18}  " + "   ".join(entries))
    return "\n".join(lines)


def main() -> None:
    """Run the methods asked for and write the results after every cell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--merge", action="store_true", help="keep other methods' results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    add_task_arguments(parser)
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    steps = options.epochs * STEPS_PER_EPOCH
    task = {"optimizer_steps": steps, "batch_size": 64, "dense_epochs": options.dense_epochs}

    starts = [dense_start(seed, options.dense_epochs) for seed in options.seeds]
    dense = [{"seed": s.seed, "test_acc": accuracy(s.model(), s.data.test)} for s in starts]
    kept = read_results(NAME, options.out) if options.merge else {}
    if kept and (kept["task"], kept["dense"]) != (task, dense):
        parser.error("cannot merge: the result file is of another task or of other dense networks")
    results = {"task": task, "dense": dense, "methods": kept.get("methods", {})}

    for name in options.methods:
        cells: list[dict[str, Any]] = []
        results["methods"][name] = record = {
            "environment": environment(),
            "schedule": asdict(tuned_schedule()) if name in ("paper", "reference") else None,
            "cells": cells,
        }
        for start in starts:
            for target in options.densities:
                cells.append(run_cell(METHODS[name], start, target, steps))
                record["summary"] = summarize(cells)
                write_results(NAME, results, options.out)
                print(name, cells[-1], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
