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
#: Values of a range among which a search in several dimensions combines.
LEVELS = 64


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
        return len(self.dimensions) == 1 and self.starts_dense(next(iter(self.dimensions)))

    def is_range(self, name: str) -> bool:
        """Whether a dimension is a range rather than a choice."""
        return isinstance(self.dimensions[name], Range)

    def starts_dense(self, name: str) -> bool:
        """Whether a dimension is a range of densities: coordinate 0 leaves everything."""
        return self.is_range(name) and "density" in name.rpartition(".")[2]

    def coordinates(self, values: dict[str, Any]) -> Tensor:
        """The point of some values, float64 of shape ``(d,)``."""
        return torch.cat([self.coordinate(name, values[name]) for name in self.dimensions])

    def coordinate(self, name: str, value: Any) -> Tensor:
        """The coordinates of one dimension, float64."""
        dimension = self.dimensions[name]
        if not isinstance(dimension, Range):
            column = [float(option == value) for option in dimension.options]
        else:
            column = [-math.log(value) if dimension.low > 0 else -value]
        return torch.tensor(column, dtype=torch.float64)

    def mildest(self) -> dict[str, Any]:
        """The high end of every range and the first option of every choice."""
        return self._values([0.0] * len(self.dimensions))

    def spread(self, name: str, count: int) -> list[Any]:
        """``count`` values of a range, even in its coordinate, mildest first; all options."""
        dimension = self.dimensions[name]
        if not isinstance(dimension, Range):
            return list(dimension.options)
        even = Range(dimension.low, dimension.high, log=dimension.low > 0)
        return [even.at(i / (count - 1)) for i in range(count)]

    def levels(self, module: nn.Module) -> dict[str, list[Any]]:
        """Values of each dimension by itself, mildest first, one per realizable structure.

        Up to 64 of a range, evenly spaced in its coordinate; all options of a choice.
        """
        graph = self.scheme.trace(module)
        mildest = self.mildest()
        found: dict[str, list[Any]] = {}
        for name, dimension in self.dimensions.items():
            if not isinstance(dimension, Range):
                found[name] = list(dimension.options)
                continue
            structures: dict[object, Any] = {}
            for value in self.spread(name, LEVELS):
                bound = self.scheme.at({**mildest, name: value}).bind(module, graph)
                structures.setdefault(bound.structure, value)
            found[name] = list(structures.values())
        return found

    def dense_point(self) -> Tensor:
        """The point that stands for the uncompressed model: the origin.

        ``u = 0`` is density 1; for other ranges and for choices it is a point outside all
        candidates, known to be feasible.
        """
        return torch.zeros_like(self.coordinates(self.mildest()))

    def candidates(self, module: nn.Module) -> list[dict[str, Any]]:
        """Values to choose from, one per realizable structure, densest first.

        An even grid along one dimension, a Sobol sequence over several. Values that give the same
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

    def diagonal(self, count: int) -> list[dict[str, Any]]:
        """``count`` points with every dimension as far as the others, mildest first."""
        return [self._values([i / (count - 1)] * len(self.dimensions)) for i in range(count)]

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
