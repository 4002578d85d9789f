"""L-C as published: runs the reference package `condensa` 0.5.0b0 from outside.

The package is not a dependency: install it beside this one with
``pip install --no-deps condensa==0.5.0b0``. `tune.py` chooses its schedule for each task.

What it takes to run the package of 2019 on today's torch:

* its loop opens the training loader anew for every L-step, where a seeded sampler would repeat
  one order: `Reshuffled` gives every pass an epoch number of its own;
* it trains the network that it is given, in place, and reads weights as contiguous memory:
  `compress` makes it a network of its own;
* it prunes layers that are a Linear or a Conv2d, with weight and bias alone: no LSTM and no
  attention (`covers`);
* it keeps ``int(density * N)`` weights, at times one less than rounding would;
* its optimizers call deprecated overloads of `Tensor.add_` and others, which warn and still work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from tasks import Start, TaskModule, shifted_and_mirrored
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler

from lightning_condensa import Prune


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
        optimizer: ``"sgd"`` with Nesterov momentum, zeroed before every L-step, or ``"adam"``.
        momentum: Of SGD.
        weight_decay: L2 penalty.
    """

    steps: int = 20
    lr: float = 0.05
    lr_end: float = 0.005
    lr_decay: float = 1.0
    mu_init: float = 1e-3
    mu_multiplier: float = 1.3
    optimizer: Literal["sgd", "adam"] = "sgd"
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
        """Return what an L-C engine takes; the rest belongs to the optimizer."""
        settings = asdict(self)
        for name in ("optimizer", "momentum", "weight_decay"):
            del settings[name]
        return {**settings, **self.iterations(budget)}

    def optimizer_for(self, parameters: Any) -> torch.optim.Optimizer:
        """The same optimizer for Lightning."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay)
        return VelocitySGD(parameters, self.lr, self.momentum, self.weight_decay)


class VelocitySGD(torch.optim.Optimizer):
    """The reference package's Nesterov SGD: ``v ← m·v − lr·g``, ``w ← w + m·v − lr·g``.

    Its velocity holds the learning rates of the steps that made it, where torch's buffer takes the
    present one. Under a learning rate that falls tenfold within 40 steps, as in the L-steps here,
    the last steps are about twice as long as torch's.
    """

    def __init__(self, parameters: Any, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.momentum = momentum
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["velocity"] = torch.zeros_like(parameter)
                change = -group["lr"] * (parameter.grad + self.weight_decay * parameter)
                velocity = state["velocity"].mul_(self.momentum).add_(change)
                parameter.add_(change).add_(velocity, alpha=self.momentum)
        return loss


class Reshuffled:
    """A task's training loader that starts a new epoch each time it is iterated."""

    def __init__(self, loader: DataLoader[tuple[Tensor, ...]], augment: bool) -> None:
        self.loader = loader
        self.augment = augment
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the next epoch's batches."""
        assert isinstance(self.loader.sampler, DistributedSampler)
        self.loader.sampler.set_epoch(self.epoch)
        self.epoch += 1
        for x, y in self.loader:
            yield (shifted_and_mirrored(x) if self.augment else x), y


class CountedLoss:
    """The task's training loss, counting the batches it has seen."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing
        self.batches = 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        self.batches += 1
        return functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


def covers(module: nn.Module) -> bool:
    """Whether the package can prune every weight that `Prune` selects."""
    layers = {target.layer for target in Prune(0.5).select(module)}
    return layers <= {"Linear", "Conv2d"}


def compress(start: Start, density: float, schedule: Schedule, budget: int) -> TaskModule:
    """Compress a copy of the dense network with the reference package.

    It is given no validation data, for which its rule is to keep the last θ, as every other
    method of the study does.

    Args:
        start: Dense weights, data and seed.
        density: Share of the weights to keep.
        schedule: Settings of the package's `LC`.
        budget: Optimizer steps in all.

    Returns:
        The task's module around θ.

    Raises:
        RuntimeError: If the package took another number of optimizer steps than the budget.
        ValueError: If it cannot prune all that `Prune` selects.
    """
    loader = Reshuffled(start.data().train_dataloader(), start.task.augment)
    return compress_batches(start, density, schedule, budget, loader)


def compress_batches(
    start: Start,
    density: float,
    schedule: Schedule,
    budget: int,
    loader: Iterable[tuple[Tensor, Tensor]],
) -> TaskModule:
    """The same on given batches; every L-step iterates over ``loader`` anew."""
    import condensa  # type: ignore[import-not-found]

    module = start.module()
    if not covers(module):
        raise ValueError(f"the reference cannot prune every weight of {start.task.name}")
    torch.manual_seed(start.seed)
    optimizers = {"sgd": condensa.opt.lc.SGD, "adam": condensa.opt.lc.Adam}
    settings = {"weight_decay": schedule.weight_decay}
    if schedule.optimizer == "sgd":
        settings["momentum"] = schedule.momentum
    engine = condensa.opt.LC(
        l_optimizer=optimizers[schedule.optimizer],
        l_optimizer_params=settings,
        debugging_flags={"disable_train_stats": True},
        **schedule.callback_arguments(budget),
    )
    loss = CountedLoss(start.task.label_smoothing)
    compressor = condensa.Compressor(
        engine,
        condensa.schemes.Prune(density),
        module.network.to(memory_format=torch.contiguous_format),  # type: ignore[call-overload]
        loader,
        None,
        None,
        loss,
    )
    module.network = compressor.run()
    if loss.batches != budget:
        raise RuntimeError(f"the reference took {loss.batches} steps, the budget is {budget}")
    return module
