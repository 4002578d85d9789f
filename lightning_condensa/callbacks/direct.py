"""Compression without retraining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn

from lightning_condensa.callbacks.checks import as_scheme
from lightning_condensa.deploy import CompressedModel, Report, load_theta
from lightning_condensa.functional.placement import reshard
from lightning_condensa.schemes import Scheme


class DirectCompression(Callback):
    """Project the module onto a scheme when training ends: the baseline for every other way.

    To compress a module that is trained already, use :meth:`CompressedModel.compress`.

    Args:
        scheme: What to compress, and how; a mapping as :meth:`Scheme.to_config` writes it, too.

    Raises:
        ValueError: If ``scheme`` is no scheme; at the start of ``fit``, if it does not fit the
            module.

    Example:
        >>> from lightning_condensa import DirectCompression, Quantize
        >>> callback = DirectCompression(Quantize("int8"))
    """

    def __init__(self, scheme: Scheme | Mapping[str, Any]) -> None:
        self.scheme = as_scheme(scheme)
        self._compressed: CompressedModel | None = None

    @property
    def compressed(self) -> CompressedModel:
        """The compressed model.

        Raises:
            RuntimeError: Before the end of ``fit``.
        """
        if self._compressed is None:
            raise RuntimeError("there is no compressed model yet: run trainer.fit first")
        return self._compressed

    def report(self) -> Report:
        """Per-layer density, bits and bytes, and why the other parameters were left alone."""
        return self.compressed.report()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the scheme against the module, before any training."""
        self.scheme.bind(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put Δ(Π(w)) into the module."""
        reshard(pl_module)
        theta = self.scheme.bind(pl_module).pi(dict(pl_module.named_parameters()))
        load_theta(pl_module, theta)
        self._compressed = CompressedModel(pl_module, theta, self.scheme)
        for text in self._compressed.report().warnings:
            rank_zero_warn(text)
