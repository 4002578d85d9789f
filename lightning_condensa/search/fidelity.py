"""Trials that take a share of the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_condensa.search.warm_start import shortened

__all__ = ["Proposal", "share_of_training"]


class Proposal(NamedTuple):
    """What to try.

    Args:
        values: The scheme's dimensions.
        fidelity: Share of the training.
    """

    values: Mapping[str, Any]
    fidelity: float = 1.0


def share_of_training(fidelity: float, trainer: Mapping[str, Any]) -> float:
    """A share of the training in whole epochs and steps.

    Args:
        fidelity: The share before it is rounded up to these.
        trainer: Arguments of the Trainer.

    Raises:
        ValueError: If it is no share, or leaves out nothing.

    Example:
        >>> share_of_training(0.25, {"max_epochs": 10})
        0.3
    """
    if not isinstance(fidelity, int | float) or isinstance(fidelity, bool) or not 0 < fidelity <= 1:
        raise ValueError(f"fidelity must be a share in (0, 1], got {fidelity!r}")
    if fidelity == 1:
        return 1.0
    limits = {
        name: trainer[name]
        for name in ("max_epochs", "max_steps")
        if trainer.get(name) not in (None, -1, 0)
    }
    left = shortened(limits, fidelity)
    share = max((left[name] / limit for name, limit in limits.items()), default=1.0)
    if share == 1:
        raise ValueError(
            f"fidelity={fidelity} must leave out some of the training, in whole epochs or steps: "
            f"trainer must have max_epochs or max_steps to shorten, got {limits or 'neither'}"
        )
    return share
