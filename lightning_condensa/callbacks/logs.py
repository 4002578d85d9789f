"""What a run writes to its loggers and progress bars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.lc import CStep, Plan
from lightning_condensa.schemes import Encoding, Scheme


def log_c_step(trainer: pl.Trainer, c_step: CStep, plan: Plan) -> None:
    """Scalars of one C-step to every logger."""
    scalars = {
        "condensa/density": c_step.density,
        f"condensa/{'rate' if plan.proximal else 'mu'}": c_step.strength,
        "condensa/gap": c_step.gap,
        "condensa/value_bytes": c_step.value_bytes,
        "condensa/c_step_seconds": c_step.seconds,
    }
    if plan.lr_exponent > 0:
        scalars["condensa/lr_factor"] = c_step.lr_factor
    if c_step.gradient_ratio is not None and math.isfinite(c_step.gradient_ratio):
        scalars["condensa/penalty_to_loss_gradient"] = c_step.gradient_ratio
    # Not through pl_module.log: it would drop steps between multiples of log_every_n_steps.
    _to_loggers(trainer, scalars)


def show_progress(pl_module: pl.LightningModule, c_step: CStep) -> None:
    """Density and gap to the progress bar."""
    values = {"density": c_step.density, "gap": c_step.gap}
    pl_module.log_dict(values, prog_bar=True, logger=False, on_step=True, on_epoch=False)


def log_summary(
    trainer: pl.Trainer, compressed: CompressedModel, scheme: Scheme, metrics: Mapping[str, float]
) -> None:
    """Per-layer figures to every logger, and a hparams entry to TensorBoard."""
    theta = compressed.theta
    per_layer = {f"condensa/layer_density/{name}": e.density for name, e in theta.items()}
    final = {
        "condensa/final_density": _density(theta),
        "condensa/final_value_bytes": compressed.value_bytes,
        **metrics,
    }
    _to_loggers(trainer, per_layer | final)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(_hparams(scheme), final)


def _density(theta: Mapping[str, Encoding]) -> float:
    """Share of non-zeros over all compressed tensors."""
    return sum(e.nnz for e in theta.values()) / max(sum(e.numel for e in theta.values()), 1)


def _to_loggers(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=trainer.global_step)


def _hparams(scheme: Scheme) -> dict[str, Any]:
    """The scalar settings of every stage, flat: ``Prune.density`` and so on."""
    flat: dict[str, Any] = {"scheme": scheme.describe()}
    for stage in scheme.stages:
        for field in fields(stage):
            value = getattr(stage, field.name)
            if isinstance(value, bool | int | float | str):
                flat[f"{type(stage).__name__}.{field.name}"] = value
    return flat
