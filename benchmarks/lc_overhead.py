"""What L-C costs: step time with and without the callback, and the C-step itself.

    python benchmarks/lc_overhead.py

Step times are taken from one optimizer step to the next inside Trainer runs of the same module,
with and without the callback; the runs alternate in one process and the ratio is of the medians.
C-steps are timed apart, beside the ``topk`` over concatenated weights that the reference uses, and
``kthvalue``.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from common import write_results
from digits import silence
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_condensa import CondensaCallback, Prune

#: Base width of the convolutional network and width of the fully connected one, by weights.
WIDTHS = {"0.3 M": (12, 270), "4 M": (42, 1000), "25 M": (104, 2500)}
CONVOLUTIONS = {"convolutions, batch 32": 32}
FULLY_CONNECTED = {"fully connected, batch 128": 128, "fully connected, batch 1,024": 1024}
C_STEP_SIZES = {"1 M": 1_000_000, "25 M": 25_000_000, "100 M": 100_000_000}


def convolutions(width: int) -> nn.Sequential:
    """Ten 3 x 3 convolutions in the shape of a VGG, for images of 32 x 32 pixels."""
    layers: list[nn.Module] = []
    channels = 3
    for factor in (1, 2, 4, 8, 8):
        for _ in range(2):
            layers += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.ReLU()]
            channels = factor * width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def fully_connected(width: int) -> nn.Sequential:
    """Four square layers: the least arithmetic per weight that a batch allows."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))


class Module(pl.LightningModule):
    """Notes when each training step begins."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.clock: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return a loss that needs every output."""
        self.clock.append(time.perf_counter())
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum: it is cheap, so that overhead shows."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def step_seconds(
    make: Callable[[], nn.Module], batch: Tensor, steps: int, callbacks: list[pl.Callback]
) -> list[float]:
    """Seconds from each step's beginning to the next one's, the first three left out."""
    torch.manual_seed(0)
    module = Module(make())
    loader: DataLoader[Tensor] = DataLoader([batch] * steps, batch_size=None)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return [b - a for a, b in pairwise(module.clock[3:])]


def overhead(
    make: Callable[[], nn.Module], batch: Tensor, seconds: float, rounds: int
) -> dict[str, Any]:
    """Step time with the callback over step time without, in each round and over all.

    Args:
        make: Builds the network.
        batch: The batch of every step.
        seconds: How long one run shall take, about; at least 20 steps are made.
        rounds: Pairs of runs.
    """
    trial = statistics.median(step_seconds(make, batch, 10, []))
    steps = max(int(seconds / trial), 20)
    ratios, plain_medians = [], []
    for _ in range(rounds):
        plain = step_seconds(make, batch, steps, [])
        # The median is of steps without a C-step, whose own cost is listed apart.
        callback = CondensaCallback(Prune(0.05), schedule={"l_steps": 4, "finetune": 0.0})
        ours = step_seconds(make, batch, steps, [callback])
        ratios.append(statistics.median(ours) / statistics.median(plain))
        plain_medians.append(statistics.median(plain))
    return {
        "steps": steps,
        "plain_ms": 1e3 * statistics.median(plain_medians),
        "ratio_of_medians": statistics.median(ratios),
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one run, about")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    silence()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    steps: dict[str, dict[str, Any]] = {kind: {} for kind in CONVOLUTIONS | FULLY_CONNECTED}
    for name, (channels, width) in WIDTHS.items():
        runs = {
            kind: (partial(convolutions, channels), torch.randn(size, 3, 32, 32))
            for kind, size in CONVOLUTIONS.items()
        }
        for kind, size in FULLY_CONNECTED.items():
            runs[kind] = (partial(fully_connected, width), torch.randn(size, width))
        for kind, (make, batch) in runs.items():
            steps[kind][name] = overhead(make, batch, args.seconds, args.rounds)
            print(kind, name, steps[kind][name], flush=True)
    c_steps = {name: c_step(numel, args.repeats) for name, numel in C_STEP_SIZES.items()}
    for name, row in c_steps.items():
        print(name, row)
    write_results("lc_overhead", {"steps": steps, "c_steps": c_steps})


if __name__ == "__main__":
    main()
