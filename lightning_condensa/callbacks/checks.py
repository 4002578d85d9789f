"""What the callbacks ask of their arguments and of the Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn

from lightning_condensa.schemes import Scheme


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


def check_trainer(trainer: pl.Trainer, monitor: str | None) -> None:
    """Raise ``ValueError`` if ``monitor`` cannot be measured; warn of checkpoints without θ."""
    if monitor is not None and not trainer.enable_validation:
        raise ValueError(f"monitor={monitor!r} needs validation, which is switched off")
    if any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks):
        rank_zero_warn(
            "a checkpoint with save_weights_only=True holds the training weights, not θ: "
            "Lightning shows it to no callback"
        )


def check_optimizers(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise ``ValueError`` if no optimizer trains the module."""
    own = set(module.parameters())
    if not any(own & set(g["params"]) for o in trainer.optimizers for g in o.param_groups):
        raise ValueError(
            "CondensaCallback needs an optimizer of the module's parameters: "
            "configure_optimizers gave none"
        )
