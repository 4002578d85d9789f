"""L-C as published: runs the reference package `condensa` 0.5.0b0 from outside, and tunes it.

The package is not a dependency: install it beside this one with
``pip install --no-deps condensa==0.5.0b0``. ``python benchmarks/reference.py`` tunes it on the
digits task and records every trial in ``results/reference_tuning.json``; `lc_quality.py` reads
the chosen schedule from there.

What it takes to run the package of 2019 on today's torch:

* its loop opens the training loader anew for every L-step, where a seeded sampler would repeat
  one order: `Reshuffled` gives every pass an epoch number of its own;
* it trains the network that it is given: `compress` makes it one of its own;
* it keeps ``int(density * N)`` weights, at times one less than rounding would;
* with weight decay it calls a deprecated overload of `Tensor.add_`, which warns and still works.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from common import read_results, write_results
from digits import (
    STEPS_PER_EPOCH,
    DigitsCNN,
    Start,
    accuracy,
    add_task_arguments,
    dense_start,
    silence,
)
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler

RESULTS_NAME = "reference_tuning"


@dataclass(frozen=True)
class Schedule:
    """The published algorithm's settings, under the reference package's names.

    Attributes:
        steps: C-steps; no L-step precedes the first, so there are ``steps - 1`` L-steps.
        lr: Learning rate at the start of the first L-step.
        lr_end: Learning rate at the end of every L-step, approached geometrically.
        lr_decay: Factor on the starting learning rate from one L-step to the next.
        mu_init: Penalty weight in the first L-step.
        mu_multiplier: Growth of the penalty weight from one L-step to the next.
        momentum: Nesterov momentum, zeroed before every L-step.
        weight_decay: L2 penalty.
    """

    steps: int = 20
    lr: float = 0.05
    lr_end: float = 0.005
    lr_decay: float = 1.0
    mu_init: float = 1e-3
    mu_multiplier: float = 1.5
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def iterations(self, budget: int) -> dict[str, int]:
        """Split a budget of mini-batches over the L-steps; the first takes the remainder."""
        each = budget // (self.steps - 1)
        return {
            "mb_iterations_per_l": each,
            "mb_iterations_first_l": budget - each * (self.steps - 2),
        }

    def callback_arguments(self, budget: int) -> dict[str, Any]:
        """Return what an L-C engine takes; momentum and weight decay belong to the optimizer."""
        settings = asdict(self)
        del settings["momentum"], settings["weight_decay"]
        return {**settings, **self.iterations(budget)}


class Reshuffled:
    """A training loader that starts a new epoch each time it is iterated."""

    def __init__(self, loader: DataLoader[tuple[Tensor, ...]]) -> None:
        self.loader = loader
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the next epoch's batches."""
        if isinstance(self.loader.sampler, DistributedSampler):
            self.loader.sampler.set_epoch(self.epoch)
        self.epoch += 1
        return iter(self.loader)


class CountedLoss:
    """The task's loss, counting the training batches it has seen."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing
        self.batches = 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy: smoothed and counted in training, plain otherwise."""
        training = logits.requires_grad
        self.batches += int(training)
        smoothing = self.label_smoothing if training else 0.0
        return functional.cross_entropy(logits, labels, label_smoothing=smoothing)


def compress(
    start: Start, density: float, schedule: Schedule, budget: int, float16: bool = False
) -> DigitsCNN:
    """Compress a copy of the dense network with the reference package.

    Args:
        start: Dense weights, data and seed.
        density: Share of the weights of Linear and Conv2d layers to keep.
        schedule: Settings of the package's `LC`.
        budget: Optimizer steps in all, each on one batch of 64.
        float16: Also round the weights to half precision.

    Returns:
        θ with the lowest validation loss among all C-steps, as the package chooses it.

    Raises:
        RuntimeError: If the package took another number of optimizer steps than the budget.
    """
    import condensa  # type: ignore[import-not-found]
    from condensa import schemes

    scheme = schemes.Prune(density)
    if float16:
        scheme = schemes.Compose([scheme, schemes.Quantize(condensa.float16)])
    engine = condensa.opt.LC(
        l_optimizer=condensa.opt.lc.SGD,
        l_optimizer_params={
            "momentum": schedule.momentum,
            "weight_decay": schedule.weight_decay,
        },
        debugging_flags={"disable_train_stats": True},
        **schedule.callback_arguments(budget),
    )
    model = start.model()  # a fresh copy, because the package trains it in place
    loss = CountedLoss(model.hparams["label_smoothing"])
    compressor = condensa.Compressor(
        engine,
        scheme,
        model,
        Reshuffled(start.data.train_dataloader()),
        None,
        start.data.val_dataloader(),
        loss,
    )
    theta: DigitsCNN = compressor.run()
    if loss.batches != budget:
        raise RuntimeError(f"the reference took {loss.batches} steps, the budget is {budget}")
    return theta


def tuned_schedule() -> Schedule:
    """Return the schedule that tuning chose.

    Raises:
        FileNotFoundError: If tuning has not been run.
    """
    results = read_results(RESULTS_NAME)
    if not results:
        raise FileNotFoundError("no tuned schedule: run `python benchmarks/reference.py` first")
    return Schedule(**results["chosen"])


class Tuner:
    """Compares schedules by mean validation accuracy and records every trial.

    Args:
        start: The dense network.
        densities: Densities to average over.
        budget: Optimizer steps of a compression.
    """

    def __init__(self, start: Start, densities: Sequence[float], budget: int) -> None:
        self.start = start
        self.densities = densities
        self.budget = budget
        self.trials: dict[Schedule, list[float]] = {}

    def score(self, schedule: Schedule) -> float:
        """Return the mean validation accuracy of θ over the densities."""
        if schedule not in self.trials:
            self.trials[schedule] = [
                accuracy(compress(self.start, d, schedule, self.budget), self.start.data.val)
                for d in self.densities
            ]
            self.write()
            print(schedule, [f"{a:.3f}" for a in self.trials[schedule]], flush=True)
        return sum(self.trials[schedule]) / len(self.densities)

    def best(self) -> Schedule:
        """Return the best schedule tried so far; the first of equals."""
        return max(self.trials, key=self.score)

    def write(self) -> None:
        """Record all trials and the best of them."""
        write_results(
            RESULTS_NAME,
            {
                "seed": self.start.seed,
                "optimizer_steps": self.budget,
                "densities": self.densities,
                "criterion": "mean validation accuracy over the densities",
                "chosen": asdict(self.best()),
                "trials": [
                    {"schedule": asdict(schedule), "val_acc": scores}
                    for schedule, scores in self.trials.items()
                ],
            },
        )


def tune(tuner: Tuner) -> Schedule:
    """Choose learning rates, then μ, then the decay and the number of steps, one after another."""
    for lr in (0.01, 0.02, 0.05, 0.1):
        tuner.score(Schedule(lr=lr, lr_end=lr / 10))
    best = tuner.best()
    for ratio in (0.5, 0.01):
        tuner.score(replace(best, lr_end=best.lr * ratio))
    best = tuner.best()
    for mu, growth in ((1e-3, 1.3), (1e-3, 1.7), (1e-2, 1.2), (1e-2, 1.3), (1e-2, 1.5)):
        tuner.score(replace(best, mu_init=mu, mu_multiplier=growth))
    best = tuner.best()
    tuner.score(replace(best, lr_decay=0.95))
    best = tuner.best()
    for steps in (10, 40, 80):  # to the same final μ
        growth = best.mu_multiplier ** ((best.steps - 2) / (steps - 2))
        tuner.score(replace(best, steps=steps, mu_multiplier=growth))
    return tuner.best()


def main() -> None:
    """Tune on one seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    add_task_arguments(parser)
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    start = dense_start(options.seed, options.dense_epochs)
    budget = options.epochs * STEPS_PER_EPOCH
    print("chosen:", tune(Tuner(start, options.densities, budget)))


if __name__ == "__main__":
    main()
