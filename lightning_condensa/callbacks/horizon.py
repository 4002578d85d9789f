"""How long a run is, in the steps that the plan counts.

A step is an optimizer step; with manual optimization, where only the module knows how many
optimizers step and when, it is a batch.
"""

from __future__ import annotations

import math

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging

from lightning_condensa.callbacks.checks import callbacks_of


def planned_steps(
    trainer: pl.Trainer, module: pl.LightningModule, start_epoch: int, start_step: int
) -> int:
    """Steps from the start of a run to its end, to be asked for when training starts.

    Unlike ``trainer.estimated_stepping_batches`` it follows a ``GradientAccumulationScheduler``,
    and knows that ``max_steps`` counts the steps of every optimizer: with manual optimization each
    batch is taken to make one with each of them.

    Args:
        trainer: The trainer.
        module: The module.
        start_epoch: ``trainer.current_epoch`` when the run began.
        start_step: ``trainer.global_step`` when the run began.

    Raises:
        ValueError: If the run has no end, or no steps.
    """
    limits = []
    if trainer.max_steps != -1:
        in_batch = 1 if module.automatic_optimization else len(trainer.optimizers)
        limits.append(math.ceil((trainer.max_steps - start_step) / in_batch))
    if trainer.max_epochs not in (None, -1) and math.isfinite(trainer.num_training_batches):
        end = trainer.max_epochs - _averaging_adds_one(trainer, module)
        limits.append(sum(_in_epoch(trainer, epoch) for epoch in range(start_epoch, end)))
    steps = min(limits, default=None)
    if steps is None or steps < 1:
        raise ValueError(
            "CondensaCallback must know how many optimizer steps are to come: set max_epochs or "
            f"max_steps on the Trainer (max_epochs={trainer.max_epochs}, "
            f"max_steps={trainer.max_steps}, {trainer.num_training_batches} batches an epoch, "
            f"begins in epoch {start_epoch} after {start_step} optimizer steps)"
        )
    return steps


def steps_per_epoch(trainer: pl.Trainer) -> int | None:
    """Steps in an epoch; ``None`` where epochs differ, or an iterable data set does not tell."""
    if _scheduler(trainer) is not None or not math.isfinite(trainer.num_training_batches):
        return None
    return _in_epoch(trainer, 0)


def trains(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether the epoch that runs trains; its one step without gradients does not count else."""
    last = trainer.max_epochs is not None and trainer.current_epoch == trainer.max_epochs - 1
    return not (last and _averaging_adds_one(trainer, module))


def _in_epoch(trainer: pl.Trainer, epoch: int) -> int:
    scheduler, accumulate = _scheduler(trainer), trainer.accumulate_grad_batches
    if scheduler is not None:
        accumulate = scheduler.get_accumulate_grad_batches(epoch)
    return math.ceil(trainer.num_training_batches / accumulate)


def _scheduler(trainer: pl.Trainer) -> GradientAccumulationScheduler | None:
    found = (c for c in callbacks_of(trainer) if isinstance(c, GradientAccumulationScheduler))
    return next(found, None)


def _averaging_adds_one(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether the last epoch only collects batch norm statistics of averaged weights."""
    averaged = any(isinstance(c, StochasticWeightAveraging) for c in callbacks_of(trainer))
    return averaged and StochasticWeightAveraging.pl_module_contains_batch_norm(module)
