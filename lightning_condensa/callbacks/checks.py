"""What the callbacks ask of their arguments and of the Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelPruning
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_condensa.lc import Plan
from lightning_condensa.schemes import BoundScheme, Scheme


def as_scheme(scheme: Scheme | Mapping[str, Any]) -> Scheme:
    """The scheme itself, or the one that a configuration describes.

    A LightningCLI passes configurations on: jsonargparse takes no subclasses of a dataclass.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(scheme, Mapping):
        return Scheme.from_config(scheme)
    if not isinstance(scheme, Scheme):
        raise ValueError(f"scheme must be a scheme such as Prune(0.1), got {scheme!r}")
    return scheme


def scheme_text(scheme: Scheme) -> str | None:
    """The scheme as text; ``None`` where it holds a function, which no text identifies."""
    try:
        scheme.to_config()
    except ValueError:
        return None
    return scheme.describe()


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """The Trainer's callbacks; its class does not declare them."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def check_trainer(trainer: pl.Trainer, monitor: str | None) -> None:
    """Raise ``ValueError`` for what cannot go along with compression; warn of what loses θ."""
    if monitor is not None and not trainer.enable_validation:
        raise ValueError(f"monitor={monitor!r} needs validation, which is switched off")
    compressing = [
        type(c).__name__
        for c in callbacks_of(trainer)
        if isinstance(c, ModelPruning) or isinstance(getattr(c, "scheme", None), Scheme)
    ]
    if len(compressing) > 1:
        raise ValueError(
            f"only one callback can compress the module, got {compressing}: compose the schemes"
        )
    if any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks):
        rank_zero_warn(
            "a checkpoint with save_weights_only=True holds the training weights, not θ: "
            "Lightning shows it to no callback"
        )


def check_strategy(trainer: pl.Trainer) -> None:
    """Raise ``ValueError`` if the strategy hides the parameters that the optimizer trains."""
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ValueError(
            "CondensaCallback needs the module's own parameters, of which "
            f"{type(trainer.strategy).__name__} makes flat buffers: use ModelParallelStrategy with "
            "fully_shard in configure_model (FSDP2), or DDPStrategy"
        )


def check_inference_mode(parameters: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` in inference mode, in which torch cannot use sharded parameters."""
    sharded = any(isinstance(p, DTensor) for p in parameters.values())
    if sharded and torch.is_inference_mode_enabled():
        raise ValueError(
            "sharded parameters (DTensors) cannot be validated in inference mode: "
            "give the Trainer inference_mode=False"
        )


def check_optimizers(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise ``ValueError`` if no optimizer trains the module."""
    own = set(module.parameters())
    if not any(own & set(g["params"]) for o in trainer.optimizers for g in o.param_groups):
        raise ValueError(
            "CondensaCallback needs an optimizer of the module's parameters: "
            "configure_optimizers gave none"
        )


def check_plan(plan: Plan, scheme: Scheme, averaged: bool) -> None:
    """Raise ``ValueError`` if the plan goes along with neither the scheme nor averaged weights."""
    by_effect = any(getattr(stage, "criterion", None) == "taylor" for stage in scheme.stages)
    if by_effect and not plan.proximal:
        raise ValueError(
            "criterion='taylor' judges by loss gradients, at which preset='paper' does not look: "
            "use preset='default', or another criterion"
        )
    if averaged and not plan.proximal:
        raise ValueError(
            "preset='paper' makes θ from its multipliers, not from weights that could be averaged: "
            "use preset='default', or leave out the callback that averages weights"
        )


def check_unchanged(
    module: pl.LightningModule, bound: BoundScheme, parameters: Mapping[str, Tensor]
) -> None:
    """Raise ``ValueError`` if the scheme selects others than the given parameters by now."""
    named = dict(module.named_parameters())
    names = {*parameters, *(bound.scheme.selected(module) - bound.selected)}
    if changed := sorted(n for n in names if parameters.get(n) is not named.get(n)):
        raise ValueError(
            f"{changed} of {type(module).__name__} were replaced or added while fit was running: "
            "make layers in configure_model or before fit"
        )
