"""Measuring the metric that a search keeps, and how noisy it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl

Stage = Literal["validate", "test"]


def evaluate(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    arguments: Mapping[str, Any],
    metric: str,
    recorder: pl.Callback | None = None,
    stage: Stage = "validate",
) -> dict[str, float]:
    """Everything that the module logs in validation, or in a test.

    Args:
        trainer: The Trainer to validate with.
        module: The module.
        arguments: Data arguments of ``Trainer.validate`` or ``Trainer.test``.
        metric: A name that must be among the logged ones.
        recorder: A callback for this run alone.
        stage: ``"validate"`` or ``"test"``.

    Raises:
        ValueError: If the module does not log ``metric``.
    """
    watching = [] if recorder is None else [recorder]
    trainer.callbacks.extend(watching)  # type: ignore[attr-defined]
    try:
        run = trainer.validate if stage == "validate" else trainer.test
        run(module, verbose=False, **arguments)
    finally:
        for callback in watching:
            trainer.callbacks.remove(callback)  # type: ignore[attr-defined]
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if metric not in logged:
        raise ValueError(
            f"metric={metric!r} is not logged by {type(module).__name__} in "
            f"{'validation' if stage == 'validate' else 'test'}; "
            f"it logs {sorted(logged)}"
        )
    return logged


def count_samples(loaders: Any) -> int | None:
    """Samples in one or several data loaders; ``None`` where a loader does not know."""
    found = loaders if isinstance(loaders, list | tuple) else [loaders]
    total = 0
    for loader in found:
        dataset = getattr(loader, "dataset", None)
        try:
            total += len(dataset)  # type: ignore[arg-type]
        except TypeError:  # an iterable data set has no length
            return None
    return total or None


def noise_variance(metric: float, samples: int | None, tolerance: float) -> float:
    """Variance of a metric measured on a validation set, against a level from the same set.

    For a share in [0, 1] it is half the binomial variance: the baseline is judged on the same
    samples, and most of them are easy for both models, which cancels about half of it. For other
    metrics, where nothing is known of a sample's share in them, a tenth of the tolerance is taken
    for the standard deviation.

    Args:
        metric: The baseline's metric.
        samples: Validation samples, or ``None`` where unknown.
        tolerance: How far the metric may fall.

    Example:
        >>> round(noise_variance(0.98, 400, 0.01) ** 0.5, 4)
        0.0052
    """
    if samples is not None and 0 <= metric <= 1:
        # Rule of succession, so that a perfect baseline is not taken to be free of noise.
        p = (metric * samples + 1) / (samples + 2)
        return p * (1 - p) / samples / 2
    return (tolerance / 10) ** 2 if tolerance > 0 else (0.001 * max(abs(metric), 1e-12)) ** 2
