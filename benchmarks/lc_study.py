"""The study behind the defaults of `LCSchedule`: one setting changed at a time.

Every variant runs at budget S on the tasks of `lc_quality.py`, without distillation, each cell
once for every seed. The `mnist-mlp` task is the one set aside: only the defaults and their nearest
rivals are run on it, after the choice::

    python benchmarks/lc_study.py --data DATA
    python benchmarks/lc_study.py --tasks mnist-mlp
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, silence
from held_out import HELD_OUT
from lc_quality import Method, Study, run
from peers import compressed
from tasks import TASKS

NAME = "lc_study"
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "importance 0": {"importance": 0.0},
    "importance 0.25": {"importance": 0.25},
    "importance 0.5": {"importance": 0.5},
    "importance 0.75": {"importance": 0.75},
    "importance 1": {"importance": 1.0},
    "shape 1": {"shape": 1.0},
    "shape 3": {"shape": 3.0},
    "shape 8": {"shape": 8.0},
    "finetune 0.1": {"finetune": 0.1},
    "finetune 0.5": {"finetune": 0.5},
    "l_steps 15": {"l_steps": 15},
    "l_steps 120": {"l_steps": 120},
    "window 2": {"window": 2},
    "window 18": {"window": 18},
    "prune_rate 0.3": {"prune_rate": 0.3},
    "prune_rate 0.1": {"prune_rate": 0.1},
    "prune_rate 0.03": {"prune_rate": 0.03},
    "lr_exponent 0": {"lr_exponent": 0.0},
    "lr_exponent 0.15": {"lr_exponent": 0.15},
    "lr_exponent 0.35": {"lr_exponent": 0.35},
    "lr_exponent 0.5": {"lr_exponent": 0.5},
    "reset_optimizer": {"reset_optimizer": True},
}
FINAL = ("default", "importance 0", "importance 1", "shape 3", "lr_exponent 0")


def _densities(task: str) -> tuple[float, ...]:
    """Three of a task's densities, the extremes among them."""
    densities = (HELD_OUT if task == HELD_OUT.name else TASKS[task]).densities
    return (*densities[:2], densities[-1])


def main() -> None:
    """Run the variants asked for and write the results after every cell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=[*TASKS, HELD_OUT.name], default=list(TASKS))
    add("--variants", nargs="+", choices=VARIANTS)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--densities", type=float, nargs="+", help="instead of each task's first three")
    add("--data", type=Path, help="folder of cifar10/ and tinyshakespeare/")
    add("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    table: dict[str, Method] = {
        name: partial(compressed, schedule=changes) for name, changes in VARIANTS.items()
    }
    wanted = [
        (task, name, density, 1, seed)
        for seed in options.seeds
        for task in options.tasks
        for name in options.variants or VARIANTS
        for density in options.densities or _densities(task)
        if task != HELD_OUT.name or name in FINAL
    ]
    run(Study(options.out, NAME), wanted, options.data, table)


if __name__ == "__main__":
    main()
