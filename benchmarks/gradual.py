"""Gradual magnitude pruning (Zhu & Gupta 2017, arXiv:1710.01878), the peer that L-C must beat.

The density falls along the cubic ``s_f [1 - (1 - t/T)^3]`` of the sparsity while training goes
on under the mask, then the last part of the run fine-tunes at the final density.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from digits import DigitsCNN, prunable
from torch import Tensor
from torch.nn import functional


class GradualPruning(pl.Callback):
    """Prunes globally by magnitude along a cubic ramp; pruned weights stay zero.

    Args:
        density: Share of the weights of Linear and Conv2d layers that remains.
        ramp: Share of the run in which the density falls; the rest is fine-tuning.
        interval: Optimizer steps between two prunings.
    """

    def __init__(self, density: float, ramp: float = 0.7, interval: int = 16) -> None:
        self.density = density
        self.ramp = ramp
        self.interval = interval
        self.ramp_steps = 0
        self.masks: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start with every weight alive."""
        self.ramp_steps = int(self.ramp * float(trainer.estimated_stepping_batches))
        self.masks = [torch.ones_like(w, dtype=torch.bool) for w in prunable(pl_module)]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Prune when it is time, then zero whatever the optimizer gave to pruned weights."""
        weights = prunable(pl_module)
        step = trainer.global_step
        if step == self.ramp_steps or (step < self.ramp_steps and step % self.interval == 0):
            left = 1 - step / self.ramp_steps
            self.masks = magnitude_masks(weights, self.density + (1 - self.density) * left**3)
        with torch.no_grad():
            for weight, mask in zip(weights, self.masks, strict=True):
                weight.mul_(mask)


@torch.no_grad()
def magnitude_masks(weights: list[Tensor], density: float) -> list[Tensor]:
    """Return masks that keep exactly ``round(density * N)`` of all weights, the largest."""
    magnitudes = torch.cat([w.abs().flatten() for w in weights])
    kept = magnitudes.topk(max(1, round(density * len(magnitudes)))).indices
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    mask[kept] = True
    parts = torch.split(mask, [w.numel() for w in weights])
    return [part.view_as(w) for part, w in zip(parts, weights, strict=True)]


class DistilledCNN(DigitsCNN):
    """The digits network, its loss mixed half and half with a dense teacher's soft labels.

    Args:
        teacher: The frozen dense network.
        temperature: Divides both networks' logits.
        hparams: Those of `DigitsCNN`.
    """

    def __init__(self, teacher: DigitsCNN, temperature: float = 4.0, **hparams: float) -> None:
        super().__init__(**hparams)
        self.teacher = [teacher.eval().requires_grad_(False)]  # in a list: no submodule
        self.temperature = temperature

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the mixed loss (Hinton et al. 2015, arXiv:1503.02531)."""
        step = super().training_step(batch, batch_idx)
        soft = functional.kl_div(
            functional.log_softmax(step["logits"] / self.temperature, dim=1),
            functional.log_softmax(self.teacher[0](batch[0]) / self.temperature, dim=1),
            log_target=True,
            reduction="batchmean",
        )
        return {**step, "loss": (step["loss"] + self.temperature**2 * soft) / 2}
