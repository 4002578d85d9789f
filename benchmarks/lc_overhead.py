"""What L-C costs: step time with and without the callback, and the C-step itself.

    python benchmarks/lc_overhead.py

Step times are taken from one optimizer step to the next inside Trainer runs of the same module,
with and without the callback; the runs alternate in one process and the ratio is of the medians.
Steps that hold a C-step are in the mean but hardly move the median, so both are given. C-steps
are timed apart, beside the ``topk`` over concatenated weights that the reference uses, and
``kthvalue``.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from common import write_results
from digits import silence
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_condensa import CondensaCallback, Prune

#: Width of four square layers, and a batch with which a plain step takes 20 ms or more.
SIZES = {"0.3 M": (270, 4096), "4 M": (1000, 512), "25 M": (2500, 128)}
C_STEP_SIZES = {"1 M": 1_000_000, "25 M": 25_000_000, "100 M": 100_000_000}


class Perceptron(pl.LightningModule):
    """Four square layers; notes when each training step begins."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
        self.clock: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return a loss that needs every output."""
        self.clock.append(time.perf_counter())
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum: it is cheap, so that overhead shows."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def step_seconds(width: int, batch: int, steps: int, callbacks: list[pl.Callback]) -> list[float]:
    """Seconds from each step's beginning to the next one's, the first five left out."""
    torch.manual_seed(0)
    module = Perceptron(width)
    loader: DataLoader[Tensor] = DataLoader([torch.randn(batch, width)] * steps, batch_size=None)
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return [b - a for a, b in zip(module.clock[5:], module.clock[6:], strict=False)]


def overhead(width: int, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Step time with the callback over step time without, in each round and over all."""
    ratios, means, plain_medians = [], [], []
    for _ in range(rounds):
        plain = step_seconds(width, batch, steps, [])
        # A density of 5 %, and one C-step every 50 steps, as in a run of some thousand steps.
        schedule = {"l_steps": max(steps // 50, 1), "finetune": 0.0}
        ours = step_seconds(width, batch, steps, [CondensaCallback(Prune(0.05), schedule=schedule)])
        ratios.append(statistics.median(ours) / statistics.median(plain))
        means.append(statistics.fmean(ours) / statistics.fmean(plain))
        plain_medians.append(statistics.median(plain))
    return {
        "plain_ms": 1e3 * statistics.median(plain_medians),
        "ratio_of_medians": statistics.median(ratios),
        "ratio_of_means_with_c_steps": statistics.median(means),
        "ratios": ratios,
    }


def c_step(numel: int, repeats: int) -> dict[str, float]:
    """Best seconds of a projection to 5 % on one thread, and of two ways to a threshold."""
    torch.manual_seed(0)
    layers = 12
    width = int((numel / layers) ** 0.5)
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    bound = Prune(0.05).bind(module)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    total = sum(w.numel() for w in weights.values())
    kept = round(0.05 * total)

    def magnitudes() -> Tensor:
        return torch.cat([w.abs().flatten() for w in weights.values()])

    ways: dict[str, Callable[[], Any]] = {
        "condensa": lambda: bound.pi(weights),
        "topk": lambda: magnitudes().topk(kept, sorted=True).values[-1],
        "kthvalue": lambda: magnitudes().kthvalue(total - kept + 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {"weights": total, **{name: min(times) for name, times in seconds.items()}}


def main() -> None:
    """Measure, print and write ``results/lc_overhead.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    silence()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    steps = {}
    for name, (width, batch) in SIZES.items():
        steps[name] = overhead(width, batch, args.steps, args.rounds)
        print(name, steps[name])
    c_steps = {name: c_step(numel, args.repeats) for name, numel in C_STEP_SIZES.items()}
    for name, row in c_steps.items():
        print(name, row)
    write_results("lc_overhead", {"steps": steps, "c_steps": c_steps})


if __name__ == "__main__":
    main()
