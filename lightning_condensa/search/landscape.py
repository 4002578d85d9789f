"""The known objective over the search space: what can be proposed, and what each is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.graph import ChannelGraph
from lightning_condensa.objectives import Objective
from lightning_condensa.schemes import Scheme
from lightning_condensa.search.domain import Axis, Domain, distinct
from lightning_condensa.search.space import SOBOL, SearchSpace
from lightning_condensa.search.utility import KnownObjective, Utility, known_objective, utilities

__all__ = ["Landscape"]

#: Levels of a range at which the objective is measured, by itself and beside another dimension.
_ANCHORS, _PAIR_ANCHORS = 10, 6
#: Combinations on which sums of tables are tested, and the relative error that is let pass.
_TESTS, _ACCEPTED = 8, 0.02
#: Relative distance from a budget within which an interpolated objective is not relied on.
_UNSURE = 0.05


class Landscape:
    """Values that can be proposed, with their utility.

    One dimension: a list of candidates. Several: a :class:`Domain` over the levels of each. The
    objective of a combination is then a sum of tables: what each dimension changes by itself, and
    what any two change together that act on the same parameters; for sizes, parameters and
    operations that is nearly exact. It is tested on combinations; where it fails, as for a latency,
    the few combinations that a proposal comes down to are measured.

    Args:
        objective: The objective.
        space: The open dimensions.
        module: The uncompressed module.
        dense: Its objective.
        budget: What the objective may come to: where that is decided, it is not interpolated.
        like: The landscape of another objective, whose combinations are to be taken.

    Attributes:
        candidates: Values for strategies that choose from a list.
        points: Their coordinates, shape ``(N, d)``.
        known: Their objective.
        utility: From objective to utility.
        domain: The combinations; ``None`` in one dimension.
        levels: The values that are combined, by dimension; ``None`` in one dimension.
    """

    def __init__(
        self,
        objective: Objective,
        space: SearchSpace,
        module: pl.LightningModule,
        dense: float,
        budget: float | None = None,
        like: Landscape | None = None,
    ) -> None:
        self.measure = KnownObjective(objective, space, module)
        self.domain: Domain | None = None
        self.levels: dict[str, list[Any]] | None = None
        if len(space.dimensions) == 1:
            self.candidates = space.candidates(module)
            self.known = known_objective(self.measure, space, self.candidates)
            self.utility = Utility(objective, [*self.known, dense])
            if budget is not None:
                self._look_near(budget)
        else:
            table = _Table(self.measure, space, module, None if like is None else like.levels)
            self.utility = Utility(objective, [*table.measured, dense])
            self.domain = table.domain(self.utility, exact=budget is not None)
            level = distinct(torch.cat([self.domain.diagonals(), self.domain.random(SOBOL)]))
            self.candidates = [table.values(row) for row in level]
            self.known = table(level).tolist()
            self._table = table
            self.levels = table.levels
        self.points = torch.stack([space.coordinates(v) for v in self.candidates])

    @property
    def utilities(self) -> Tensor:
        """Utilities of the candidates, float64 of shape ``(N,)``."""
        return utilities(self.utility, self.known)

    def _look_near(self, budget: float) -> None:
        """Measure the candidates so near to a budget that interpolation does not tell."""
        edge = self.utility(budget)
        for i, values in enumerate(self.candidates):
            if abs(self.utility(self.known[i]) - edge) <= _UNSURE:
                self.known[i] = self.measure(values)

    def values(self, point: Tensor) -> dict[str, Any]:
        """The values of a proposed point ``(d,)``."""
        if self.domain is not None:
            return self._table.values(self.domain.nearest(point[None])[0])
        gap = (self.points - point).abs().amax(dim=-1)
        return self.candidates[int(gap.argmin())]


class _Table:
    """The objective of combinations as a sum over dimensions and pairs of them."""

    def __init__(
        self,
        measure: KnownObjective,
        space: SearchSpace,
        module: nn.Module,
        levels: dict[str, list[Any]] | None = None,
    ) -> None:
        self.measure, self.space = measure, space
        self.levels: dict[str, list[Any]] = (
            self._ordered(space.levels(module)) if levels is None else levels
        )
        self.mildest = {name: own[0] for name, own in self.levels.items()}
        self.base = measure(self.mildest)
        along = {name: self._along(name, own) for name, own in self.levels.items()}
        self.alone = [torch.from_numpy(found - self.base) for found in along.values()]
        self.pairs = self._pairs(module)

    def _ordered(self, levels: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """With the options of choices from the one that saves least."""
        self.mildest = {name: own[0] for name, own in levels.items()}
        sign = 1.0 if self.measure.objective.direction == "min" else -1.0
        for name, own in levels.items():
            if not self.space.is_range(name):
                order = np.argsort(-sign * self._along(name, own), kind="stable")
                levels[name] = [own[i] for i in order]
        return levels

    @property
    def measured(self) -> list[float]:
        """All values of the objective that were measured."""
        return list(self.measure.cache.values())

    def values(self, level: Tensor) -> dict[str, Any]:
        """The values of one combination ``(A,)``."""
        return {
            name: own[i] for (name, own), i in zip(self.levels.items(), level.tolist(), strict=True)
        }

    def __call__(self, level: Tensor) -> Tensor:
        """The objective of combinations ``[M, A]``, approximately; shape ``[M]``."""
        total = torch.full((len(level),), self.base, dtype=torch.float64)
        for axis, table in enumerate(self.alone):
            total += table[level[:, axis]]
        for (first, second), joint in self.pairs.items():
            total += joint[level[:, first], level[:, second]]
        floor = 1e-3 * min(self.measured)  # sums must not leave the range of a positive objective
        return total.clamp(min=floor) if floor > 0 else total

    def domain(self, utility: Utility, exact: bool) -> Domain:
        """The combinations with the sums as their utility.

        Args:
            utility: From objective to utility.
            exact: Whether to measure what a proposal comes down to also where sums are right.
        """
        axes = tuple(self._axis(name, own) for name, own in self.levels.items())

        def summed(level: Tensor) -> Tensor:
            return utility.of(self(level))

        def measured(level: Tensor) -> Tensor:
            return utilities(utility, [self.measure(self.values(row)) for row in level])

        domain = Domain(axes, summed)
        tests = domain.random(_TESTS, seed=0)
        wrong = float((summed(tests) - measured(tests)).abs().max())
        return Domain(axes, summed, measured) if exact or wrong > _ACCEPTED else domain

    def _axis(self, name: str, values: Sequence[Any]) -> Axis:
        levels = torch.stack([self.space.coordinate(name, value) for value in values])
        if not self.space.is_range(name):
            return Axis(levels, origin=None)
        return Axis(levels, 0.0 if self.space.starts_dense(name) else float(levels[0, 0]))

    def _along(self, name: str, values: Sequence[Any], **others: Any) -> np.ndarray[Any, Any]:
        """The objective along one dimension: measured at anchors, interpolated between them."""
        count = len(values)
        anchors = np.arange(count)
        if self.space.is_range(name):
            most = _PAIR_ANCHORS if others else _ANCHORS
            anchors = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
        at = [self.measure({**self.mildest, **others, name: values[int(i)]}) for i in anchors]
        if not self.space.is_range(name):
            return np.array(at)
        along = np.array([float(v) for v in values])  # a size is nearly linear in a density
        found: np.ndarray[Any, Any] = np.interp(
            along[::-1], along[anchors][::-1], np.array(at)[::-1]
        )
        return np.ascontiguousarray(found[::-1], dtype=np.float64)

    def _pairs(self, module: nn.Module) -> dict[tuple[int, int], Tensor]:
        """What two dimensions that act on the same parameters change together."""
        touched = self._touched(module)
        names = list(self.levels)
        pairs = {}
        for first, second in combinations(range(len(names)), 2):
            if touched[names[first]].isdisjoint(touched[names[second]]):
                continue
            if not self.space.is_range(names[second]):
                ranged, stepped = first, second
            else:
                ranged, stepped = second, first
            joint = self._joint(names[ranged], names[stepped])
            joint = joint - self.base - self.alone[ranged][:, None] - self.alone[stepped]
            joint[0], joint[:, 0] = 0.0, 0.0
            pairs[ranged, stepped] = joint
        return pairs

    def _joint(self, ranged: str, stepped: str) -> Tensor:
        """The objective over two dimensions, the others at their mildest."""
        own, other = self.levels[ranged], self.levels[stepped]
        if not self.space.is_range(stepped):
            rows = [self._along(ranged, own, **{stepped: value}) for value in other]
            return torch.from_numpy(np.stack(rows, axis=1))
        # Two ranges: a few values of the second, the others between them.
        at = np.unique(np.linspace(0, len(other) - 1, _PAIR_ANCHORS).round().astype(int))
        rows = [self._along(ranged, own, **{stepped: other[int(i)]}) for i in at]
        along = np.array([float(v) for v in other])
        grid = np.stack(rows, axis=1)
        filled = [np.interp(along[::-1], along[at][::-1], row[::-1])[::-1] for row in grid]
        return torch.from_numpy(np.stack(filled))

    def _touched(self, module: nn.Module) -> dict[str, set[str]]:
        """The parameters whose stored form each dimension changes."""
        graph = self.space.scheme.trace(module)
        reference = _stored(module, self.space.scheme.at(self.mildest), graph)
        touched = {}
        for name, own in self.levels.items():
            scheme = self.space.scheme.at({**self.mildest, name: own[-1]})
            stored = _stored(module, scheme, graph)
            touched[name] = {n for n in reference if reference[n] != stored[n]}
        return touched


def _stored(module: nn.Module, scheme: Scheme, graph: ChannelGraph) -> Mapping[str, object]:
    """What decides the size of each compressed parameter."""
    theta = CompressedModel.compress(module, scheme, graph).theta
    return {name: (e.nnz, e.value_bits, len(e.leaves)) for name, e in theta.items()}
