"""Compression density by density, each rung from the one before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl

from lightning_condensa.callbacks.condensa import CondensaCallback
from lightning_condensa.callbacks.distillation import Distillation
from lightning_condensa.callbacks.teacher import frozen_copy
from lightning_condensa.deploy import CompressedModel
from lightning_condensa.schemes import Scheme


def geometric_densities(target: float, rungs: int, start: float = 1.0) -> list[float]:
    """Densities at equal ratios from below ``start`` down to ``target``.

    Args:
        target: The last density, in (0, start).
        rungs: How many.
        start: The density before the first rung.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(d, 4) for d in geometric_densities(0.01, 2)]
        [0.1, 0.01]
    """
    if not isinstance(rungs, int) or rungs < 1:
        raise ValueError(f"rungs must be an int >= 1, got {rungs!r}")
    if not 0 < target < start <= 1:
        raise ValueError(f"densities must fall from start <= 1, got {start!r} to {target!r}")
    return [start * (target / start) ** ((i + 1) / rungs) for i in range(rungs)]


def compress_ladder(
    module: pl.LightningModule,
    schemes: Sequence[Scheme],
    *,
    trainer: Mapping[str, Any],
    distillation: Mapping[str, Any] | None = None,
    on_rung: Callable[[int, CompressedModel], None] | None = None,
    fit: Mapping[str, Any] | None = None,
    **callback: Any,
) -> list[CompressedModel]:
    """Compress with one scheme after another, each run starting from the θ of the one before.

    A run that starts from sparse weights takes up the density ramp where they are, so each rung
    spends its steps below the last density. The module holds the last θ afterwards.

    Args:
        module: The trained network; trained in place.
        schemes: From the densest to the sparsest.
        trainer: Arguments of the ``Trainer`` of each rung; its ``callbacks`` are shared.
        distillation: Arguments of a :class:`Distillation`; its teacher, if none is given, is the
            module as it is before the first rung. ``None`` for none.
        on_rung: Called with the number of a rung, from 0, and its result, to save it say.
        fit: Arguments of ``Trainer.fit``: ``datamodule``, or data loaders.
        callback: Arguments of each :class:`CondensaCallback`.

    Returns:
        One compressed model per scheme, each with a frozen copy of the module.

    Raises:
        ValueError: If ``schemes`` is empty, or as :class:`CondensaCallback` does.

    Example:
        >>> from lightning_condensa import Prune
        >>> schemes = [Prune(d) for d in geometric_densities(0.01, 4)]
    """
    if not schemes:
        raise ValueError("schemes must hold at least one scheme, got none")
    settings = dict(trainer)
    shared = list(settings.pop("callbacks", None) or [])
    lessons = None if distillation is None else {"teacher": frozen_copy(module), **distillation}
    results = []
    for rung, scheme in enumerate(schemes):
        condensa = CondensaCallback(scheme, **callback)
        callbacks = [*shared, condensa]
        if lessons is not None:
            callbacks.append(Distillation(**lessons))
        pl.Trainer(**settings, callbacks=callbacks).fit(module, **(fit or {}))
        # The next rung trains the module on.
        results.append(CompressedModel(frozen_copy(module), condensa.compressed.theta, scheme))
        if on_rung is not None:
            on_rung(rung, results[-1])
    return results
