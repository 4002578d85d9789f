"""The objective as something to maximize, known at every candidate before any training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.objectives import Objective
from lightning_condensa.search.space import SearchSpace

#: Candidates at which a one-dimensional objective is evaluated; the others are interpolated.
_ANCHORS = 20


class Utility:
    """Turns values of an objective into utilities: higher is better, differences are relative.

    Positive objectives enter by their logarithm; others in units of their range.

    Args:
        objective: The objective.
        values: Some of its values, to see whether they are positive and how far they range.
    """

    def __init__(self, objective: Objective, values: list[float]) -> None:
        self._sign = 1.0 if objective.direction == "max" else -1.0
        self._log = all(v > 0 for v in values)
        self._range = max(values) - min(values) or 1.0

    def __call__(self, value: float) -> float:
        """The utility of a value."""
        if self._log:
            return self._sign * math.log(max(value, math.ulp(0.0)))
        return self._sign * value / self._range

    def of(self, values: Tensor) -> Tensor:
        """The utilities of many values, of the same shape."""
        if self._log:
            return self._sign * values.clamp(min=math.ulp(0.0)).log()
        return self._sign * values / self._range


class KnownObjective:
    """The objective of values, from projected but untrained copies of a module; each once.

    Args:
        objective: The objective.
        space: The open dimensions.
        module: The module.

    Attributes:
        cache: What has been measured.
    """

    def __init__(
        self, objective: Objective, space: SearchSpace, module: pl.LightningModule
    ) -> None:
        self.objective = objective
        self.cache: dict[tuple[Any, ...], float] = {}
        self._space, self._module = space, module
        self._graph = space.scheme.trace(module)

    def __call__(self, values: Mapping[str, Any]) -> float:
        """The objective."""
        key = tuple(values[name] for name in self._space.dimensions)
        if key not in self.cache:
            scheme = self._space.scheme.at(values)
            compressed = CompressedModel.compress(self._module, scheme, self._graph)
            self.cache[key] = self.objective(compressed)
        return self.cache[key]


def known_objective(
    evaluate: KnownObjective, space: SearchSpace, candidates: list[dict[str, Any]]
) -> list[float]:
    """The objective at every candidate of one dimension.

    That of a range is evaluated at up to 20 candidates and interpolated between them along the
    coordinate.
    """
    if len(candidates) <= _ANCHORS:
        return [evaluate(values) for values in candidates]
    points = torch.stack([space.coordinates(v) for v in candidates])
    if points.shape[1] > 1:  # a single choice
        return [evaluate(values) for values in candidates]
    picked = np.unique(np.linspace(0, len(candidates) - 1, _ANCHORS).round().astype(int))
    measured = np.array([evaluate(candidates[i]) for i in picked])
    along = points[:, 0].numpy()
    if (measured > 0).all():  # bytes and seconds bend less on a logarithmic scale
        return [float(v) for v in np.exp(np.interp(along, along[picked], np.log(measured)))]
    return [float(v) for v in np.interp(along, along[picked], measured)]


def utilities(utility: Utility, values: list[float]) -> Tensor:
    """Utilities of several values, float64 of shape ``(N,)``."""
    return torch.tensor([utility(v) for v in values], dtype=torch.float64)
