"""Accuracy under each quantizer at equal optimizer steps: L-C beside two other ways.

    python benchmarks/quantizers.py --tasks digits-cnn
    python benchmarks/quantizers.py --data DATA

Every way starts from the same dense weights and trains for the same number of steps with the
task's optimizer. *Once* trains on and rounds at the end. *Straight-through* is quantization-aware
training: each forward pass rounds the weights as the scheme does (to a codebook that is fitted anew
in every 16th step), gradients pass the rounding unchanged (Bengio et al. 2013, arXiv:1308.3432),
and the rounded weights are shipped. Cells are written one by one and not computed twice.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, silence
from lc_quality import Study
from peers import fit, optimizer_steps
from tasks import TASKS, Start, TaskModule, dense_start
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_condensa import Codebook, Compose, CondensaCallback, Quantize, Scheme

NAME = "quantizers"
#: The first and the last weight of each task's network, about 1 % of the weights of most.
ENDS = r"^network\.(net\.)?(0|8|20)\."


def ends_in_int8(scheme: Scheme) -> Scheme:
    """The scheme between the first and the last layer, and int8 for these."""
    return Compose([Quantize("int8", include=(ENDS,)), replace(scheme, exclude=(ENDS,))])


SCHEMES: dict[str, Scheme] = {
    "int8": Quantize("int8"),
    "int4": Quantize("int4"),
    "ternary": Quantize("ternary"),
    "binary": Quantize("binary"),
    "codebook 2": Codebook(2),
    "codebook 16": Codebook(16),
    "binary between int8": ends_in_int8(Quantize("binary")),
    "codebook 2 between int8": ends_in_int8(Codebook(2)),
}
WAYS = ("lc", "once", "straight-through")


class Rounded(nn.Module):
    """Rounds one weight in each forward pass; its gradient passes unchanged."""

    def __init__(self, scheme: Scheme, layer: nn.Module) -> None:
        super().__init__()
        self.bound = [scheme.bind(layer)]  # no submodule

    def forward(self, weight: Tensor) -> Tensor:
        """Return w rounded, with the gradient of w."""
        with torch.no_grad():
            rounded = self.round(weight)
        return weight + (rounded - weight).detach()

    def round(self, weight: Tensor) -> Tensor:
        """Return Δ(Π(w))."""
        bound = self.bound[0]
        (rounded,) = bound.delta(bound.pi(dict.fromkeys(bound.names, weight))).values()
        return rounded


class Clustered(Rounded):
    """Rounds to the nearest value of a codebook that is fitted in every 16th forward pass.

    Optimal k-means in every step would take many times the step itself.
    """

    every = 16

    def __init__(self, scheme: Scheme, layer: nn.Module) -> None:
        super().__init__(scheme, layer)
        self.passes = 0
        self.values = torch.empty(0)

    def round(self, weight: Tensor) -> Tensor:
        """Return the nearest values of the present codebook."""
        if self.passes % self.every == 0:
            self.values = super().round(weight).unique()
        self.passes += 1
        middles = (self.values[1:] + self.values[:-1]) / 2
        return self.values[torch.bucketize(weight, middles)]


def compressed(
    start: Start, epochs: int, scheme: Scheme, way: str, plain: Callable[[], TaskModule]
) -> TaskModule:
    """The task's module with rounded weights, trained in one of the ways.

    Args:
        start: Dense weights and data.
        epochs: Of training.
        scheme: How to round.
        way: One of ``WAYS``.
        plain: The module after as many epochs without rounding; left as it is.
    """
    module = start.module()
    if way == "lc":
        return fit(module, start, [CondensaCallback(scheme)], epochs)
    if way == "once":
        return rounded(copy.deepcopy(plain()), scheme)
    chosen = [(stage, t.name) for stage in scheme.stages for t in stage.select(module)]
    layers = [module.get_submodule(name.rpartition(".")[0]) for _, name in chosen]
    for (stage, _), layer in zip(chosen, layers, strict=True):
        rounding = Clustered if isinstance(stage, Codebook) else Rounded
        own = replace(stage, include=(), exclude=())  # the layer by itself has another name
        parametrize.register_parametrization(layer, "weight", rounding(own, layer))
    fit(module, start, [], epochs)
    for layer in layers:
        # What it would leave, w + (rounded − w), is off the rounded values in the last bits.
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    return rounded(module, scheme)


def rounded(module: TaskModule, scheme: Scheme) -> TaskModule:
    """The module, with Δ(Π(w)) in the place of w."""
    bound, weights = scheme.bind(module), dict(module.named_parameters())
    module.load_state_dict(bound.delta(bound.pi(weights)), strict=False)
    return module


def cell(
    start: Start, name: str, way: str, budget: int, plain: Callable[[], TaskModule]
) -> dict[str, Any]:
    """Compress once and measure.

    Raises:
        RuntimeError: If a weight is not as the scheme rounds it.
    """
    task, scheme = start.task, SCHEMES[name]
    begin = time.perf_counter()
    module = compressed(start, budget * task.epochs, scheme, way, plain)
    seconds = time.perf_counter() - begin
    bound = scheme.bind(module)
    named = dict(module.named_parameters())
    for key, rounded in bound.delta(bound.pi(named)).items():
        if not torch.equal(rounded, named[key].detach()):
            raise RuntimeError(f"{way} left {key} off the values of {name}")
    return {
        "task": task.name,
        "method": f"{name}, {way}",
        "density": 1.0,
        "budget": budget,
        "seed": start.seed,
        "test": task.measure(module, start.splits.test),
        "val": task.measure(module, start.splits.val),
        "optimizer_steps": optimizer_steps(start, budget * task.epochs),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Run what was asked for and write the results after every cell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=["digits-cnn", "cifar-vgg", "cifar-resnet8"])
    add("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--budget", type=int, default=1, help="times about 1,500 optimizer steps")
    add("--data", type=Path, help="folder of cifar10/")
    add("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    study = Study(options.out, NAME)
    for task in options.tasks:
        for seed in options.seeds:
            start = dense_start(TASKS[task], seed, options.data)
            study.add_dense(start, options.budget)
            epochs = options.budget * start.task.epochs
            plain = cache(partial(fit, start.module(), start, [], epochs))
            for name in options.schemes:
                for way in options.ways:
                    key = (task, f"{name}, {way}", 1.0, options.budget, seed)
                    study.ensure(key, partial(cell, start, name, way, options.budget, plain))


if __name__ == "__main__":
    main()
