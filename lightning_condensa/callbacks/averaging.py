"""Living with Lightning's callbacks that average weights."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, StochasticWeightAveraging
from torch import nn

from lightning_condensa.callbacks.checks import callbacks_of

_WEIGHT_AVERAGING: Any = getattr(pl.callbacks, "WeightAveraging", ())  # new in Lightning 2.6


def _averages(callback: Callback) -> bool:
    return isinstance(callback, (StochasticWeightAveraging, _WEIGHT_AVERAGING))


def is_averaged(trainer: pl.Trainer) -> bool:
    """Whether a callback averages the weights."""
    return any(map(_averages, callbacks_of(trainer)))


def move_behind_averaging(trainer: pl.Trainer, own: Callback) -> None:
    """Let ``own`` follow the callbacks that average weights, wherever the user put it.

    When training ends and in checkpoints they put the average where the weights were: whoever
    compresses it has to come later.
    """
    callbacks = callbacks_of(trainer)
    if any(map(_averages, callbacks[callbacks.index(own) :])):
        others = [c for c in callbacks if c is not own]
        end = 1 + max(i for i, c in enumerate(others) if _averages(c))
        trainer.callbacks = [*others[:end], own, *others[end:]]  # type: ignore[attr-defined]


def deployed_module(trainer: pl.Trainer, module: nn.Module) -> nn.Module:
    """Whose weights are validated and saved: the average of ``WeightAveraging``, or the module."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, _WEIGHT_AVERAGING) and callback._average_model is not None:
            average: nn.Module = callback._average_model.module
            return average
    return module
