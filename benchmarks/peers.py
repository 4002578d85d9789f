"""The methods that are compared, each a function from a dense network to θ.

All train for the same number of optimizer steps of the task's batches, from the same weights, in
the same order of batches (the reference package: in an order of its own), and ship their last
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import RESULTS, read_results
from gradual import GradualPruning, SteppedModelPruning
from reference import Schedule, compress
from tasks import QUIET, Start, TaskModule
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_condensa import CondensaCallback, Distillation, Prune

OURS_TUNING = "ours_tuning"
GRADUAL_TUNING = "gradual_tuning"
REFERENCE_TUNING = "reference_tuning"


@dataclass(frozen=True)
class Methods:
    """The methods, with the settings that were tuned for each task.

    Attributes:
        tuning: Folder of the tuning results.
    """

    tuning: Path = RESULTS

    def ours(
        self, start: Start, density: float, epochs: int, *, distilled: bool = False
    ) -> TaskModule:
        """L-C with this package's defaults."""
        lr = self._chosen(OURS_TUNING, start)["lr"]
        return compressed(at_rate(start, lr), density, epochs, distilled=distilled)

    def gradual(
        self, start: Start, density: float, epochs: int, *, distilled: bool = False
    ) -> TaskModule:
        """Gradual magnitude pruning."""
        chosen = self._chosen(GRADUAL_TUNING, start)
        start = at_rate(start, chosen["lr"])
        return pruned(start, density, epochs, chosen["ramp"], distilled=distilled)

    def one_shot(self, start: Start, density: float, epochs: int) -> TaskModule:
        """All pruned before the first step, at the learning rate of gradual pruning."""
        start = at_rate(start, self._chosen(GRADUAL_TUNING, start)["lr"])
        return pruned(start, density, epochs, 0.0)

    def model_pruning(self, start: Start, density: float, epochs: int) -> TaskModule:
        """Lightning's own pruning callback, which reads weights as contiguous memory."""
        chosen = self._chosen(GRADUAL_TUNING, start)
        start = at_rate(start, chosen["lr"])
        module = start.module()
        module.to(memory_format=torch.contiguous_format)
        callback = SteppedModelPruning(module, density, chosen["ramp"])
        return fit(module, start, [callback], epochs)

    def reference(self, start: Start, density: float, epochs: int) -> TaskModule:
        """The published L-C as the reference package implements it."""
        return compress(start, density, self._schedule(start), optimizer_steps(start, epochs))

    def paper(self, start: Start, density: float, epochs: int) -> TaskModule:
        """The published L-C through this package, on the schedule tuned for the reference."""
        return published(start, density, epochs, self._schedule(start))

    def _schedule(self, start: Start) -> Schedule:
        return Schedule(**self._chosen(REFERENCE_TUNING, start))

    def _chosen(self, name: str, start: Start) -> dict[str, Any]:
        results = read_results(name, self.tuning)
        if start.task.name not in results:
            raise FileNotFoundError(
                f"{name}.json has no settings for {start.task.name}: "
                "run `python benchmarks/tune.py` first"
            )
        chosen: dict[str, Any] = results[start.task.name]["chosen"]
        return chosen


def at_rate(start: Start, lr: float) -> Start:
    """The same start, to be compressed at another learning rate."""
    return replace(start, task=replace(start.task, lr=lr))


def compressed(
    start: Start,
    density: float,
    epochs: int,
    *,
    schedule: Mapping[str, Any] | None = None,
    distilled: bool = False,
) -> TaskModule:
    """L-C with this package's defaults, but for some fields of its schedule."""
    callbacks: list[pl.Callback] = [CondensaCallback(Prune(density), schedule=schedule)]
    if distilled:
        callbacks.append(Distillation(weight=0.5, temperature=4.0))
    return fit(start.module(), start, callbacks, epochs)


def pruned(
    start: Start, density: float, epochs: int, ramp: float, *, distilled: bool = False
) -> TaskModule:
    """Gradual magnitude pruning over a share of the run; one-shot pruning with a ramp of 0."""
    module = DistilledModule(start) if distilled else start.module()
    return fit(module, start, [GradualPruning(density, ramp)], epochs)


def published(start: Start, density: float, epochs: int, schedule: Schedule) -> TaskModule:
    """The published L-C through this package."""
    callback = CondensaCallback(
        Prune(density),
        preset="paper",
        schedule=schedule.callback_arguments(optimizer_steps(start, epochs)),
    )
    return fit(PaperModule(start, schedule), start, [callback], epochs)


class PaperModule(TaskModule):
    """A dense network under the schedule's optimizer: the callback drives the learning rate."""

    def __init__(self, start: Start, schedule: Schedule) -> None:
        super().__init__(start.task)
        self.load_state_dict(start.weights)
        self.schedule = schedule

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer alone."""
        return self.schedule.optimizer_for(self.parameters())


class DistilledModule(TaskModule):
    """A dense network, its loss mixed half and half with its own frozen copy's soft labels.

    Args:
        start: Where both begin.
        weight: Share of the distillation loss.
        temperature: Divides both networks' logits.
    """

    def __init__(self, start: Start, weight: float = 0.5, temperature: float = 4.0) -> None:
        super().__init__(start.task)
        self.load_state_dict(start.weights)
        self.teacher = [start.module().network.eval().requires_grad_(False)]  # no submodule
        self.weight = weight
        self.temperature = temperature
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, noting the input: the teacher sees it as it was augmented."""
        self.seen = x
        return super().forward(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the mixed loss (Hinton et al. 2015, arXiv:1503.02531)."""
        step = super().training_step(batch, batch_idx)
        with torch.no_grad():
            taught = self.teacher[0](self.seen)
        soft = functional.kl_div(
            functional.log_softmax(step["logits"] / self.temperature, dim=1),
            functional.log_softmax(taught / self.temperature, dim=1),
            log_target=True,
            reduction="batchmean",
        )
        loss = (1 - self.weight) * step["loss"] + self.weight * self.temperature**2 * soft
        return {**step, "loss": loss}


def optimizer_steps(start: Start, epochs: int) -> int:
    """Optimizer steps in some epochs of a task."""
    return epochs * (len(start.splits.train) // start.task.batch_size)


def fit(
    module: TaskModule, start: Start, callbacks: Sequence[pl.Callback], epochs: int
) -> TaskModule:
    """Train a module on the task's data under some callbacks, without validation.

    Raises:
        RuntimeError: If that took another number of optimizer steps than the budget.
    """
    pl.seed_everything(start.seed, verbose=False)
    loader = start.data().train_dataloader()
    return _train(module, loader, callbacks, epochs, optimizer_steps(start, epochs))


def fit_batches(
    module: TaskModule, callbacks: Sequence[pl.Callback], batches: list[tuple[Tensor, Tensor]]
) -> TaskModule:
    """The same on given batches, once each."""
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    return _train(module, loader, callbacks, 1, len(batches))


def _train(
    module: TaskModule,
    loader: DataLoader[Any],
    callbacks: Sequence[pl.Callback],
    epochs: int,
    steps: int,
) -> TaskModule:
    settings: dict[str, Any] = {**QUIET, "max_epochs": epochs, "limit_val_batches": 0}
    trainer = pl.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, loader)
    if trainer.global_step != steps:
        raise RuntimeError(f"{trainer.global_step} optimizer steps, the budget is {steps}")
    return module
