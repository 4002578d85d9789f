"""Pruning by magnitude while training: gradual (Zhu & Gupta 2017, arXiv:1710.01878) and one-shot.

Both prune the tensors that `lightning_condensa.Prune` selects, by one threshold over all of them.
Pruned weights get no gradient, as in the authors' implementation: with SGD's momentum they would
else come back by chance, which kills a network with batch norm. The same cubic ramp drives
Lightning's own callback.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelPruning
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_condensa import Prune

INTERVAL = 16


class GradualPruning(pl.Callback):
    """Prunes globally by magnitude along a cubic ramp; pruned weights stay zero.

    Args:
        density: Share of the weights that remains.
        ramp: Share of the run in which the density falls; the rest is fine-tuning. With 0 all
            is pruned before the first step.
        interval: Optimizer steps between two prunings.
    """

    def __init__(self, density: float, ramp: float, interval: int = INTERVAL) -> None:
        self.density = density
        self.ramp = ramp
        self.interval = interval
        self.ramp_steps = 0
        self.weights: list[Tensor] = []
        self.masks: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the weights; prune here where there is no ramp."""
        self.ramp_steps = int(self.ramp * float(trainer.estimated_stepping_batches))
        self.weights = prunable(pl_module)
        self.masks = [torch.ones_like(w, dtype=torch.bool) for w in self.weights]
        self._prune(0)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Leave pruned weights without a gradient."""
        for weight, mask in zip(self.weights, self.masks, strict=True):
            if weight.grad is not None:
                weight.grad.mul_(mask)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Prune when it is time, then undo what momentum gave to pruned weights."""
        self._prune(trainer.global_step)

    @torch.no_grad()
    def _prune(self, step: int) -> None:
        if due(step, self.ramp_steps, self.interval):
            density = density_at(step, self.ramp_steps, self.density)
            self.masks = magnitude_masks(self.weights, density)
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.mul_(mask)


class SteppedModelPruning(ModelPruning):
    """Lightning's `ModelPruning` along the same ramp.

    By itself it prunes once an epoch, and an epoch is a fifth or half of some runs here; so its
    ``apply_pruning`` is called every few optimizer steps instead, each time with the number of
    weights still to go. Weights are not rewound (``use_lottery_ticket_hypothesis=False``).

    Args:
        module: The module to prune.
        density: Share of the weights that remains.
        ramp: Share of the run in which the density falls.
        interval: Optimizer steps between two prunings.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        density: float,
        ramp: float,
        interval: int = INTERVAL,
    ) -> None:
        owners = [name.rpartition(".") for name in prunable_names(module)]
        super().__init__(
            "l1_unstructured",
            parameters_to_prune=[(module.get_submodule(o), name) for o, _, name in owners],
            use_lottery_ticket_hypothesis=False,
        )
        self.density = density
        self.ramp = ramp
        self.interval = interval
        self.ramp_steps = 0
        self.total = self.alive = sum(w.numel() for w in prunable(module))
        for attention in module.modules():
            if isinstance(attention, nn.MultiheadAttention):
                attention.register_forward_pre_hook(refresh_output_projection)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learn the length of the run."""
        self.ramp_steps = int(self.ramp * float(trainer.estimated_stepping_batches))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Prune when it is time."""
        step = trainer.global_step
        if due(step, self.ramp_steps, self.interval):
            kept = round(density_at(step, self.ramp_steps, self.density) * self.total)
            if kept < self.alive:
                self.apply_pruning(self.alive - kept)
                self.alive = kept

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: pruning goes by optimizer steps."""


def refresh_output_projection(attention: nn.MultiheadAttention, args: Any) -> None:
    """Mask the output projection anew before each forward pass.

    The attention reads ``out_proj.weight`` without calling ``out_proj``, so that the hook by which
    `torch.nn.utils.prune` masks it never runs (pytorch/pytorch#69353).
    """
    for hook in attention.out_proj._forward_pre_hooks.values():
        hook(attention.out_proj, args)


def prunable_names(module: nn.Module) -> list[str]:
    """The names of the parameters that `Prune` selects."""
    return [target.name for target in Prune(0.5).select(module)]


def prunable(module: nn.Module) -> list[Tensor]:
    """The parameters that `Prune` selects."""
    named = dict(module.named_parameters())
    return [named[name] for name in prunable_names(module)]


def due(step: int, ramp_steps: int, interval: int) -> bool:
    """Whether to prune after a step: every ``interval`` steps, and where the ramp ends."""
    return step == ramp_steps or (step < ramp_steps and step % interval == 0)


def density_at(step: int, ramp_steps: int, final: float) -> float:
    """The density after a step of the ramp ``s_f [1 − (1 − t/T)³]`` of the sparsity s.

    Example:
        >>> density_at(0, 10, 0.1), density_at(5, 10, 0.1), density_at(10, 10, 0.1)
        (1.0, 0.2125, 0.1)
    """
    left = 1 - step / ramp_steps if step < ramp_steps else 0.0
    return final + (1 - final) * left**3


@torch.no_grad()
def magnitude_masks(weights: list[Tensor], density: float) -> list[Tensor]:
    """Return masks that keep exactly ``round(density * N)`` of all weights, the largest."""
    magnitudes = torch.cat([w.abs().flatten() for w in weights])
    kept = magnitudes.topk(max(1, round(density * len(magnitudes)))).indices
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    mask[kept] = True
    parts = torch.split(mask, [w.numel() for w in weights])
    return [part.view_as(w) for part, w in zip(parts, weights, strict=True)]
