"""The open dimensions of a scheme as coordinates, candidates and Optuna distributions."""

from __future__ import annotations

import math
from typing import Any

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from lightning_condensa.schemes import Range, Scheme

GRID = 256
SOBOL = 128


class SearchSpace:
    """The values a scheme leaves open.

    Coordinates are ``−ln(value)`` for a positive range and ``−value`` otherwise, so that they grow
    with compression from the dense model at ``density = 1``; a choice has one 0/1 coordinate per
    option.

    Args:
        scheme: A scheme with at least one open dimension.

    Raises:
        ValueError: If the scheme has none.

    Example:
        >>> from lightning_condensa import Prune, Range
        >>> space = SearchSpace(Prune(Range(0.01, 1.0, log=True)))
        >>> space.coordinates({"density": 0.1})
        tensor([2.3026], dtype=torch.float64)
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.dimensions = scheme.space()
        if not self.dimensions:
            raise ValueError(
                f"the scheme {scheme.describe()} has nothing to search: "
                "put a Range or Choice where a number stands"
            )

    @property
    def is_density(self) -> bool:
        """Whether the only dimension is a density, whose coordinate is ``u = −ln(density)``."""
        if len(self.dimensions) != 1:
            return False
        ((name, dimension),) = self.dimensions.items()
        return isinstance(dimension, Range) and "density" in name.rpartition(".")[2]

    def coordinates(self, values: dict[str, Any]) -> Tensor:
        """The point of some values, float64 of shape ``(d,)``."""
        point: list[float] = []
        for name, dimension in self.dimensions.items():
            value = values[name]
            if not isinstance(dimension, Range):
                point += [float(option == value) for option in dimension.options]
            elif dimension.low > 0:
                point.append(-math.log(value))
            else:
                point.append(-value)
        return torch.tensor(point, dtype=torch.float64)

    def dense_point(self) -> Tensor:
        """The point that stands for the uncompressed model: the origin.

        ``u = 0`` is density 1; for other ranges and for choices it is a point outside all
        candidates, known to be feasible.
        """
        return torch.zeros_like(self.coordinates(self._values([0.0] * len(self.dimensions))))

    def candidates(self, module: nn.Module) -> list[dict[str, Any]]:
        """Values to choose from, one per realizable structure, densest first.

        A grid for one dimension, a Sobol sequence for several. Values that give the same
        structure on ``module`` (densities that keep the same count) appear once.
        """
        if len(self.dimensions) == 1:
            fractions = [[i / (GRID - 1)] for i in range(GRID)]
        else:
            engine = SobolEngine(len(self.dimensions), scramble=False)  # type: ignore[no-untyped-call]
            fractions = engine.draw(SOBOL, dtype=torch.float64).tolist()
        structures: dict[object, dict[str, Any]] = {}
        graph = self.scheme.trace(module)
        for point in fractions:
            values = self._values(point)
            structures.setdefault(self.scheme.at(values).bind(module, graph).structure, values)
        return list(structures.values())

    def extremes(self) -> list[dict[str, Any]]:
        """The least and the most compressed corner: what must be valid before a search starts."""
        ends = [self._values([end] * len(self.dimensions)) for end in (0.0, 1.0)]
        return ends

    def distributions(self) -> dict[str, BaseDistribution]:
        """The dimensions as Optuna describes them."""
        return {
            name: FloatDistribution(dimension.low, dimension.high, log=dimension.log)
            if isinstance(dimension, Range)
            else CategoricalDistribution(tuple(dimension.options))
            for name, dimension in self.dimensions.items()
        }

    def _values(self, fractions: list[float]) -> dict[str, Any]:
        """Values at fractions in [0, 1] of each dimension, 0 being the densest."""
        values: dict[str, Any] = {}
        for (name, dimension), fraction in zip(self.dimensions.items(), fractions, strict=True):
            if isinstance(dimension, Range):
                values[name] = dimension.at(fraction)
            else:
                count = len(dimension.options)
                values[name] = dimension.options[min(int(fraction * count), count - 1)]
        return values
