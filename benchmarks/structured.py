"""Accuracy with whole filters removed, at equal optimizer steps, beside torch-pruning.

    python benchmarks/structured.py --data DATA

All ways start from the same dense weights, remove filters of convolutions until a share of them is
left, and train for the same number of steps of the task's optimizer. Ours: `FilterPrune` under L-C,
as it is and with `coupled=True`. torch-pruning (Fang et al. 2023, arXiv:2301.12900): *magnitude*
prunes before the first step and fine-tunes; *group norm* trains the first half under its group
penalty, prunes, and fine-tunes in the second half. Each with one density for all layers, and with
one ranking of all filters (``global``). A share of filters is not a share of the network: the
parameters and FLOPs that are left after physical removal stand beside the accuracy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch_pruning as tp  # type: ignore[import-untyped]
from common import RESULTS, silence
from lc_quality import Study
from peers import fit, optimizer_steps
from tasks import TASKS, Start, TaskModule, dense_start
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_condensa import CondensaCallback, FilterPrune

NAME = "structured"
DENSITIES = (0.5, 0.25)

Way = Callable[[Start, float, int], nn.Module]


def ours(
    start: Start, density: float, epochs: int, *, coupled: bool, ranked_globally: bool
) -> nn.Module:
    """L-C with this package's defaults, then removal."""
    module = start.module()
    module.example_input_array = example(start)
    scope: Literal["global", "layer"] = "global" if ranked_globally else "layer"
    callback = CondensaCallback(FilterPrune(density, coupled=coupled, scope=scope))
    fit(module, start, [callback], epochs)
    return callback.compressed.shrink(example(start)).module


def magnitude(start: Start, density: float, epochs: int, *, ranked_globally: bool) -> nn.Module:
    """Prune, then fine-tune."""
    module = start.module()
    pruner = tp.pruner.MagnitudePruner(
        module.network,
        example(start),
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=1 - density,
        global_pruning=ranked_globally,
        ignored_layers=linears(module),
    )
    pruner.step()
    return finetuned(module, start, epochs)


def group_norm(start: Start, density: float, epochs: int, *, ranked_globally: bool) -> nn.Module:
    """Train under the group penalty, prune, then fine-tune."""
    module = start.module()
    pruner = tp.pruner.GroupNormPruner(
        module.network,
        example(start),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1 - density,
        global_pruning=ranked_globally,
        ignored_layers=linears(module),
    )
    fit(module.train(), start, [GroupPenalty(pruner)], epochs // 2)
    pruner.step()
    return finetuned(module, start, epochs - epochs // 2)


def finetuned(module: TaskModule, start: Start, epochs: int) -> nn.Module:
    """A module that torch-pruning has pruned, and left in evaluation mode, trained on."""
    # With oneDNN of torch 2.13 the process dies of corrupted memory on ResNet-8 at a quarter.
    with torch.backends.mkldnn.flags(enabled=False):
        return fit(module.train(), start, [], epochs)


class GroupPenalty(pl.Callback):
    """Adds torch-pruning's penalty to the gradients; its strengths follow the norms each epoch."""

    def __init__(self, pruner: Any) -> None:
        self.pruner = pruner

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the strength of each group."""
        self.pruner.update_regularizer()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the penalty's gradient."""
        self.pruner.regularize(self.pruner.model)


def linears(module: TaskModule) -> list[nn.Module]:
    """Layers whose outputs no way prunes."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def example(start: Start) -> Tensor:
    """One input."""
    return start.splits.train.tensors[0][:1]


def flops(module: nn.Module, inputs: Tensor) -> int:
    """Of one forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(inputs)
    return int(counter.get_total_flops())


WAYS: dict[str, Way] = {
    "L-C": partial(ours, coupled=False, ranked_globally=False),
    "L-C, global": partial(ours, coupled=False, ranked_globally=True),
    "L-C, coupled": partial(ours, coupled=True, ranked_globally=False),
    "L-C, coupled, global": partial(ours, coupled=True, ranked_globally=True),
    "torch-pruning, magnitude": partial(magnitude, ranked_globally=False),
    "torch-pruning, magnitude, global": partial(magnitude, ranked_globally=True),
    "torch-pruning, group norm": partial(group_norm, ranked_globally=False),
    "torch-pruning, group norm, global": partial(group_norm, ranked_globally=True),
}


def cell(start: Start, name: str, density: float) -> dict[str, Any]:
    """Compress once and measure."""
    task = start.task
    begin = time.perf_counter()
    module = WAYS[name](start, density, task.epochs)
    seconds = time.perf_counter() - begin
    dense = start.module()
    return {
        "task": task.name,
        "method": name,
        "density": density,
        "budget": 1,
        "seed": start.seed,
        "test": task.measure(module, start.splits.test),
        "val": task.measure(module, start.splits.val),
        "parameters": sum(p.numel() for p in module.parameters())
        / sum(p.numel() for p in dense.parameters()),
        "flops": flops(module, example(start)) / flops(dense, example(start)),
        "optimizer_steps": optimizer_steps(start, task.epochs),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Run what was asked for and write the results after every cell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=["digits-cnn", "cifar-vgg", "cifar-resnet8"])
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--data", type=Path, help="folder of cifar10/")
    add("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    study = Study(options.out, NAME)
    for task in options.tasks:
        for seed in options.seeds:
            start = dense_start(TASKS[task], seed, options.data)
            study.add_dense(start, 1)
            for name in options.ways:
                for density in DENSITIES:
                    key = (task, name, density, 1, seed)
                    study.ensure(key, partial(cell, start, name, density))


if __name__ == "__main__":
    main()
