"""Trials that go on from a denser trial's model: from which, how, and for how long."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from lightning_condensa.callbacks import Distillation
from lightning_condensa.callbacks.teacher import frozen_copy
from lightning_condensa.deploy import load_compressed
from lightning_condensa.search.space import SearchSpace

if TYPE_CHECKING:
    from lightning_condensa.search.store import Record

__all__ = ["WarmStart", "keep_teachers", "nearest_denser", "shortened"]

#: Least distance from a parent, a third of the weights: from a nearer one hardly any are left to be
#: chosen, and children end worse than those of a parent of twice the density.
APART = 0.4
#: What Lightning trains where neither ``max_epochs`` nor ``max_steps`` is given.
_LIGHTNING_EPOCHS = 1000


@dataclass(frozen=True)
class WarmStart:
    """Where a trial begins instead of the dense model; plain data, for workers.

    Attributes:
        parent: Number of the trial whose model it is.
        path: That model, a packed file.
        share: Of the full training, in (0, 1].
    """

    parent: int
    path: Path
    share: float

    def load(self, module: pl.LightningModule) -> None:
        """Put the parent's θ, and all else that it holds, into a module, in place."""
        load_compressed(self.path, module)


def keep_teachers(callbacks: Iterable[pl.Callback], dense: pl.LightningModule) -> None:
    """Let the dense model teach: what training starts from, the usual teacher, is not it.

    Args:
        callbacks: Of the trial's Trainer; a :class:`~lightning_condensa.Distillation` with no
            teacher of its own gets one.
        dense: The uncompressed module.
    """
    for callback in callbacks:
        if isinstance(callback, Distillation) and callback.teacher is None:
            callback.teacher = frozen_copy(dense.get_submodule(callback.layer or ""))


def nearest_denser(
    space: SearchSpace, values: Mapping[str, Any], records: Iterable[Record], least: float
) -> WarmStart | None:
    """The start of a trial from the nearest finished one that is nowhere sparser, and not too near.

    The nearer it is, the shorter the training: of the way in ``−ln(density)`` from the dense model
    (from the mildest value, in a range of something else) that share which is still to go, in the
    dimension where most is.

    Args:
        space: The dimensions.
        values: Of the trial.
        records: Trials that ended; only those that were trained to their end and whose packed
            model is there can be a start.
        least: Share of the training that no trial goes below.

    Returns:
        The nearest by the sum of distances along all coordinates, which is at least `APART`, and
        the first of equals; ``None`` where there is none.
    """
    point = space.coordinates(dict(values))

    def distance(record: Record) -> float:
        return float((space.coordinates(record.values) - point).abs().sum())

    able = [
        r
        for r in records
        if r.outcome.status == "complete"
        and _covers(space, r.values, values)
        and distance(r) >= APART
        and r.model.exists()
    ]
    if not able:
        return None
    parent = min(able, key=lambda r: (distance(r), r.number))
    share = min(max(least, _left(space, parent.values, values)), 1.0)
    return WarmStart(parent.number, parent.model, share)


def shortened(trainer: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Arguments of a Trainer for a share of the training, in whole steps and epochs, rounded up.

    Args:
        trainer: Arguments of the Trainer for all of it.
        share: In (0, 1].

    Example:
        >>> shortened({"max_epochs": 10, "check_val_every_n_epoch": 5}, 0.25)
        {'max_epochs': 3, 'check_val_every_n_epoch': 3}
    """
    own = dict(trainer)
    steps, epochs = own.get("max_steps", -1), own.get("max_epochs")
    if epochs is None and steps == -1:
        epochs = _LIGHTNING_EPOCHS
    if steps != -1:
        own["max_steps"] = math.ceil(share * steps)
    if epochs is not None and epochs != -1:
        own["max_epochs"] = math.ceil(share * epochs)
        every = own.get("check_val_every_n_epoch")
        if every is not None:  # the best θ is chosen by validation: at least one
            own["check_val_every_n_epoch"] = min(every, max(own["max_epochs"], 1))
    for least in ("min_steps", "min_epochs"):
        if own.get(least) is not None:
            own[least] = math.ceil(share * own[least])
    return own


def _covers(space: SearchSpace, denser: Mapping[str, Any], sparser: Mapping[str, Any]) -> bool:
    """Whether no dimension of the first is sparser (or a later option) than of the second."""
    return all(_place(space, n, denser[n]) <= _place(space, n, sparser[n]) for n in sparser)


def _place(space: SearchSpace, name: str, value: Any) -> float:
    """Grows with compression."""
    if space.is_range(name):
        return float(space.coordinate(name, value))
    return float(space.spread(name, 1).index(value))


def _left(space: SearchSpace, parent: Mapping[str, Any], child: Mapping[str, Any]) -> float:
    mildest = space.mildest()
    shares = [0.0]
    for name in filter(space.is_range, child):
        origin = 0.0 if space.starts_dense(name) else _place(space, name, mildest[name])
        end = _place(space, name, child[name])
        gone = _place(space, name, parent[name])
        if end > gone:
            shares.append((end - gone) / (end - origin))
    return max(shares)
