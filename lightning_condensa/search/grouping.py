"""Groups of weights that bear about as much: the dimensions of a search, chosen by a scan."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.functional.kmeans import kmeans_1d, nearest
from lightning_condensa.schemes import Compose, Scheme
from lightning_condensa.schemes.groups import cover
from lightning_condensa.search.metrics import evaluate
from lightning_condensa.search.sensitivity import POINTS, crossing
from lightning_condensa.search.space import SearchSpace
from lightning_condensa.search.trial import Data, Mode, make_trainer

__all__ = ["groups_by_sensitivity"]


def groups_by_sensitivity(
    scheme: Scheme,
    model: pl.LightningModule,
    metric: str | Callable[[pl.LightningModule], float],
    val_dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
    *,
    groups: int = 6,
    mode: Mode = "max",
    loss: float = 0.02,
    trainer: Mapping[str, Any] | None = None,
) -> list[str]:
    r"""Patterns for :func:`per_group`, of weights that lose about as soon when compressed alone.

    Each weight is compressed by itself, without training, with all dimensions of the scheme
    further and further at once; where the metric has lost ``loss`` is how much it bears. These
    places are clustered into groups of least squared distance (the optimal one-dimensional
    k-means). It takes six validations for each weight.

    Args:
        scheme: A scheme with search dimensions, a composition too, whose stages with dimensions
            select the same weights.
        model: The trained network; left as it is.
        metric: A metric that it logs in validation; or a function from a compressed copy to a
            metric, which needs no data.
        val_dataloaders: As for ``Trainer.validate``.
        datamodule: As for ``Trainer.validate``, instead of loaders.
        groups: How many at most; there are fewer where weights do not differ.
        mode: Whether more (``"max"``) or less of the metric is better.
        loss: How much is much, in the metric's units.
        trainer: Keyword arguments of the Trainer that validates.

    Returns:
        A regular expression for each group, most sensitive first; together they match every
        weight.

    Raises:
        ValueError: If an argument is out of range or the scheme has nothing to search.

    Example:
        >>> from lightning_condensa import Prune, Range, per_group
        >>> class Net(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.mid, self.last = (torch.nn.Linear(9, 9) for _ in range(3))
        >>> def accuracy(net):  # only the first layer matters
        ...     return float((net.first.weight != 0).float().mean())
        >>> prune, net = Prune(Range(0.1, 1.0)), Net()
        >>> found = groups_by_sensitivity(prune, net, accuracy)
        >>> found
        ['^first\\.', '^(?:mid\\.|last\\.)']
        >>> len(per_group(prune, net, by=found).space())
        2
    """
    _check(groups, mode, loss)
    names = _names(scheme, model)
    with tempfile.TemporaryDirectory() as folder:
        measure = metric
        if isinstance(measure, str):
            data = _data(val_dataloaders, datamodule)
            measure = _validation(measure, data, dict(trainer or {}), Path(folder))
        places = [
            _place(_only(scheme, name), model, measure, loss, 1.0 if mode == "max" else -1.0)
            for name in names
        ]
    along = torch.tensor(places)
    index = nearest(along, kmeans_1d(along, groups)).tolist()
    clusters = [[n for n, i in zip(names, index, strict=True) if i == k] for k in sorted({*index})]
    # Biases and others that are not compressed may be matched, too.
    return [cover(cluster, {*names} - {*cluster}) for cluster in clusters]


def _check(groups: int, mode: str, loss: float) -> None:
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"groups must be an int >= 1, got {groups!r}")
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
    if not 0 < loss < math.inf:
        raise ValueError(f"loss must be a finite number > 0, got {loss!r}")


def _names(scheme: Scheme, model: pl.LightningModule) -> list[str]:
    stages = [stage for stage in scheme.stages if stage.space()]
    if not stages:
        raise ValueError(f"the scheme {scheme.describe()} has no Range or Choice to give to groups")
    first, *others = [[t.name for t in stage.select(model)] for stage in stages]
    for stage, own in zip(stages[1:], others, strict=True):
        if set(own) != set(first):
            raise ValueError(
                f"scheme: {stage.describe()} selects other weights than {stages[0].describe()}; "
                "group each of them by itself"
            )
    return first


def _only(scheme: Scheme, name: str) -> Scheme:
    """The searched stages, for one weight."""
    include = (f"^{re.escape(name)}$",)
    stages = [replace(s, include=include, exclude=()) for s in scheme.stages if s.space()]
    return stages[0] if len(stages) == 1 else Compose(stages)


def _place(
    scheme: Scheme,
    model: pl.LightningModule,
    measure: Callable[[pl.LightningModule], float],
    loss: float,
    sign: float,
) -> float:
    """How far in [0, 1] a scheme can go before the metric has lost so much; more than 1: so far."""
    space, graph = SearchSpace(scheme), scheme.trace(model)
    metrics, along = [], torch.linspace(0, 1, POINTS + 1, dtype=torch.float64)
    for values in space.diagonal(POINTS + 1):
        compressed = CompressedModel.compress(model, scheme.at(values), graph)
        assert isinstance(compressed.module, pl.LightningModule)  # a copy of the user's
        metrics.append(measure(compressed.module))
    losses = sign * (metrics[0] - torch.tensor(metrics, dtype=torch.float64))
    return float(crossing(along, losses.nan_to_num(nan=math.inf), loss))


def _data(loaders: Any, datamodule: pl.LightningDataModule | None) -> Data:
    if (loaders is None) == (datamodule is None):
        raise ValueError(
            "metric by name needs val_dataloaders or a datamodule, one of them; "
            f"got val_dataloaders={loaders!r}, datamodule={datamodule!r}"
        )
    return Data(datamodule, val=loaders)


def _validation(
    metric: str, data: Data, trainer: dict[str, Any], folder: Path
) -> Callable[[pl.LightningModule], float]:
    def measure(module: pl.LightningModule) -> float:
        runner = make_trainer({**trainer, "logger": False}, folder)
        return evaluate(runner, module, data.validate_arguments(), metric)[metric]

    return measure
