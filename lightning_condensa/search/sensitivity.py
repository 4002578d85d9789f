"""What each dimension costs by itself, without training: validation passes only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.search.space import SearchSpace

__all__ = ["Sensitivity", "crossing"]

#: Values of a range at which the metric is measured, the high end left out.
POINTS = 6


@dataclass(frozen=True)
class Sensitivity:
    """Metrics of the network compressed in one dimension at a time, and not trained.

    Attributes:
        reference: The metric with every dimension at its mildest value.
        metrics: For each dimension ``(value, metric)`` pairs, mildest first; NaN where the metric
            is not a number.
    """

    reference: float
    metrics: Mapping[str, list[tuple[Any, float]]]

    @classmethod
    def scan(
        cls,
        space: SearchSpace,
        module: pl.LightningModule,
        measure: Callable[[pl.LightningModule], float],
        points: int = POINTS,
    ) -> Sensitivity:
        """Measure: six values of each range, evenly spaced in its coordinate, and all options.

        Args:
            space: The dimensions.
            module: The network; left as it is.
            measure: From a compressed copy to its metric; called once for each value.
            points: Values of each range.

        Example:
            >>> from lightning_condensa import Prune, Range
            >>> class Net(pl.LightningModule):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.layer = torch.nn.Linear(10, 10)
            >>> def kept(net):
            ...     return float((net.layer.weight != 0).float().mean())
            >>> found = Sensitivity.scan(
            ...     SearchSpace(Prune(Range(0.1, 1.0, log=True))), Net(), kept, points=2
            ... )
            >>> [round(metric, 2) for _, metric in found.metrics["density"]]
            [1.0, 0.32, 0.1]
        """
        graph = space.scheme.trace(module)
        mildest = space.mildest()

        def metric(values: Mapping[str, Any]) -> float:
            compressed = CompressedModel.compress(module, space.scheme.at(values), graph)
            assert isinstance(compressed.module, pl.LightningModule)  # a copy of the user's
            return measure(compressed.module)

        reference = metric(mildest)
        metrics: dict[str, list[tuple[Any, float]]] = {}
        for name in space.dimensions:
            metrics[name] = [
                (value, reference if value == mildest[name] else metric({**mildest, name: value}))
                for value in space.spread(name, points + 1)
            ]
        return cls(reference, metrics)

    def losses(self, name: str, sign: float = 1.0) -> dict[Any, float]:
        """What each value of a dimension loses.

        Args:
            name: The dimension.
            sign: 1 where more of the metric is better, else -1.
        """
        return {
            value: math.inf if math.isnan(found) else sign * (self.reference - found)
            for value, found in self.metrics[name]
        }

    def prior(self, space: SearchSpace, loss: float, sign: float = 1.0) -> Tensor:
        """The scan as a problem holds it (`Problem.scan`), shape ``(d,)``.

        Args:
            space: The dimensions.
            loss: Where a range is said to lose the first points.
            sign: 1 where more of the metric is better, else -1.
        """
        parts = []
        for name in space.dimensions:
            losses = self.losses(name, sign)
            if space.is_range(name):
                along = torch.cat([space.coordinate(name, value) for value in losses])
                parts.append(crossing(along, torch.tensor([*losses.values()]).double(), loss))
            else:
                parts.append(torch.tensor([*losses.values()], dtype=torch.float64).clamp(0, 1))
        return torch.cat(parts)

    def ranking(self, loss: float, sign: float = 1.0) -> list[str]:
        """Dimensions that are ranges, most sensitive first: by the largest value that loses much.

        Args:
            loss: What counts as much.
            sign: 1 where more of the metric is better, else -1.
        """

        def first(name: str) -> float:
            lost = [float(v) for v, found in self.losses(name, sign).items() if found >= loss]
            return max(lost, default=-math.inf)

        ranges = [n for n in self.metrics if all(_is_number(v) for v, _ in self.metrics[n])]
        return sorted(ranges, key=first, reverse=True)

    def to_dict(self) -> dict[str, Any]:
        """As plain data; a metric that is not a number becomes ``None``."""
        metrics = {
            name: [[value, None if math.isnan(found) else found] for value, found in pairs]
            for name, pairs in self.metrics.items()
        }
        return {"reference": self.reference, "metrics": metrics}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """What `to_dict` gave."""
        metrics = {
            name: [(value, math.nan if found is None else float(found)) for value, found in pairs]
            for name, pairs in data["metrics"].items()
        }
        return cls(float(data["reference"]), metrics)


def crossing(along: Tensor, losses: Tensor, loss: float) -> Tensor:
    """Where the loss first reaches a level, between the measured places; shape ``(1,)``.

    A range that never loses so much is taken to lose it one step beyond its end.
    """
    beyond = torch.nonzero(losses >= loss).flatten()
    if len(beyond) == 0:
        return 2 * along[-1:] - along[-2:-1]
    i = int(beyond[0])
    if i == 0:
        return along[:1]
    low, high = float(losses[i - 1]), float(losses[i])
    share = (loss - low) / (high - low) if math.isfinite(high) else 0.5
    return along[i - 1 : i] + share * (along[i] - along[i - 1])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
