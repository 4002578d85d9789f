"""The compressed model in the place of the one that trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_condensa.callbacks.averaging import deployed_module
from lightning_condensa.callbacks.batchnorm import BatchNormStatistics
from lightning_condensa.callbacks.sharded import gathered, placed_like
from lightning_condensa.callbacks.swap import WeightSwap
from lightning_condensa.callbacks.teacher import tensors_of
from lightning_condensa.deploy import load_theta
from lightning_condensa.functional.placement import reshard
from lightning_condensa.lc import LCRun
from lightning_condensa.schemes import Encoding

_CHECKPOINT_KEY = "condensa_training_weights"


class Deployment:
    """Puts θ into the module for validation, into checkpoints, and at last for good.

    Where :class:`~pytorch_lightning.callbacks.WeightAveraging` validates and saves an average of
    the weights, θ is made from that average.

    Args:
        trainer: The trainer.
        module: The module that trains.
        parameters: Its compressed parameters by name.
        bn_batches: Training batches to estimate batch norm statistics from.

    Attributes:
        module: The module whose weights are deployed: that one, or the average.
        statistics: Batch norm statistics that fit θ.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        parameters: Mapping[str, Tensor],
        bn_batches: int,
    ) -> None:
        wrapped = trainer.strategy.model is not module
        self.statistics = BatchNormStatistics(module, bn_batches, redirected=wrapped)
        self.module = deployed_module(trainer, module)
        self._averaged = self.module is not module
        self._devices = {name: p.device for name, p in parameters.items()}
        self._swap = WeightSwap(self.module, [*parameters, *self.statistics.names])

    def theta(self, run: LCRun) -> dict[str, Encoding]:
        """What would be deployed now."""
        weights = self._swap.training_weights  # an average may be kept on another device
        chosen = {name: weights[name].to(d) for name, d in self._devices.items()}
        return run.project(chosen if self._averaged else run.latent(chosen))

    def begin(self, trainer: pl.Trainer, run: LCRun) -> None:
        """Put θ in place, with batch norm statistics that fit."""
        theta = self.theta(run)
        stale = self.statistics.stale(run, theta)
        self._swap.swap_in({name: encoded.decode() for name, encoded in theta.items()})
        if stale:
            self.statistics.estimate(trainer, self.module)

    def end(self) -> None:
        """Put the training weights back, if θ is in place."""
        self._swap.swap_out()

    def save(self, trainer: pl.Trainer, run: LCRun, checkpoint: dict[str, Any]) -> None:
        """Put θ into ``state_dict``, and the training weights under a key of their own."""
        weights = self._swap.training_weights
        copies = {name: w.detach().clone() for name, w in weights.items()}
        checkpoint[_CHECKPOINT_KEY] = gathered(copies)
        validating = self._swap.swapped
        if not validating:
            self.begin(trainer, run)
        self._swap.overwrite(checkpoint["state_dict"])
        if not validating:
            self.end()

    def finish(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        theta: Mapping[str, Encoding],
        stale: bool,
    ) -> None:
        """Leave θ in the module.

        Args:
            trainer: The trainer.
            module: The module that trained.
            theta: θ.
            stale: Whether batch norm statistics are to be estimated.
        """
        load_theta(module, theta)
        if stale:
            self.statistics.estimate(trainer, module)
        if self.module is not module:  # it is swapped in again by later validations
            self.module.load_state_dict(module.state_dict())
        self.statistics.clear()
        reshard(module)


def load_training_weights(
    trainer: pl.Trainer, module: pl.LightningModule, checkpoint: Mapping[str, Any]
) -> None:
    """Take up what :meth:`Deployment.save` set aside, if it did."""
    if _CHECKPOINT_KEY in checkpoint:
        modules = {deployed_module(trainer, module)}
        if "averaging_state" not in checkpoint:  # of a run without WeightAveraging
            modules.add(module)
        for each in modules:
            weights = placed_like(checkpoint[_CHECKPOINT_KEY], tensors_of(each))
            each.load_state_dict(weights, strict=False)
