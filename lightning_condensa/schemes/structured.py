"""Structured pruning: the same exact density over groups of weights; N:M sparsity."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_condensa.functional.chunks import chunk_length
from lightning_condensa.functional.criteria import Criterion, Reduction, get_criterion
from lightning_condensa.functional.grouping import Blocks, Grouping, n_m_mask
from lightning_condensa.functional.placement import elementwise, like, local, part_shape, uncut
from lightning_condensa.functional.ranks import Ranks, count_nonzero
from lightning_condensa.functional.topk import topk_masks
from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.bound import PRUNE
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.finite import require_finite
from lightning_condensa.schemes.prune import DensityPrune, Pool
from lightning_condensa.schemes.selection import CONV_TYPES, LINEAR_TYPES, Target

#: The least effect of a group that is not zero, whose square is a float32 too: it outranks zeros.
_FLOOR = 1e-15


@dataclass(frozen=True)
class GroupPrune(DensityPrune):
    """Structured pruning under any grouping; base of the structured pruners.

    Of a DTensor each process scores the groups it holds. Where shards cut groups (rows of a weight
    sharded along its inputs), the weight is sharded along another dimension for the scoring; a
    ``ValueError`` names the parameter where no way to shard leaves the groups whole.

    Attributes:
        criterion: Score of a group: ``"l1"``, ``"l2"``, ``"max"``, ``"mean"``, ``"min"``,
            ``"sum"``, ``"taylor"`` or a callable (see
            :mod:`lightning_condensa.functional.criteria`).
        align: Keep a multiple of this many groups in each tensor (the nearest one, at least
            one multiple, at most all groups).
        prune_bias: Also zero the bias of a removed row or filter.
    """

    criterion: str | Criterion = field(default="l2", kw_only=True)
    align: int = field(default=1, kw_only=True)
    prune_bias: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        get_criterion(self.criterion)
        if not isinstance(self.align, int) or self.align < 1:
            raise ValueError(f"align must be an int >= 1, got {self.align!r}")

    @abstractmethod
    def grouping(self, target: Target) -> Grouping:
        """The groups of one tensor."""

    def score(self, target: Target, weight: Tensor) -> Tensor:
        """The criterion over each group's magnitudes, in the grid of groups."""
        grouping = self.grouping(target)
        grid = torch.Size(grouping.grid(weight.shape))
        if weight.is_meta:  # only counted: a criterion may branch on values
            return weight.new_empty(grid)
        unit = grouping.unit(weight.shape)
        weight = uncut(weight, unit, target.name)
        part = local(weight)
        score = self._scored(grouping, part, unit[0])
        shape = grouping.grid(part.shape)
        self._check(score, math.prod(shape), target.name, Ranks.holding([weight]))
        return like(score.view(shape), weight, grid)

    def _scored(self, grouping: Grouping, weight: Tensor, extent: int | None) -> Tensor:
        criterion = get_criterion(self.criterion)
        if isinstance(criterion, Reduction) and isinstance(grouping, Blocks):
            values = (criterion.each(_wide(s)) for s in _slabs(weight, extent, 4))
            reduced = _joined([grouping.reduce(v, criterion) for v in values])
            return criterion.finish(reduced, grouping.sizes(weight).squeeze(1))
        if callable(self.criterion):  # which may look at all groups
            extent = None
        return _joined([self._rated(*grouping.split(s)) for s in _slabs(weight, extent)])

    def rate(self, rows: Tensor, sizes: Tensor, name: str, ranks: Ranks) -> Tensor:
        """The criterion of groups that are given as rows.

        Args:
            rows: The weights of each group, shape ``(groups, size)``.
            sizes: How many of them there are, shape ``(groups, 1)``.
            name: Whose they are, for the error.
            ranks: The processes that hold parts.

        Raises:
            ValueError: If the criterion does not return a number for each group.
        """
        score = self._rated(rows, sizes)
        self._check(score, len(sizes), name, ranks)
        return score

    def _rated(self, rows: Tensor, sizes: Tensor) -> Tensor:
        magnitudes = _wide(rows.abs())
        return get_criterion(self.criterion)(magnitudes, sizes.to(magnitudes.dtype))

    def _check(self, score: Tensor, groups: int, name: str, ranks: Ranks) -> None:
        wrong = score.shape != (groups,) or bool(score.isnan().any())
        if any(ranks.totals([wrong])):
            raise ValueError(
                f"criterion {self.criterion!r} must return {groups} scores that are not NaN "
                f"for {name}, got shape {tuple(score.shape)}"
            )

    def left(self, theta: Mapping[str, Encoded], target: Target) -> tuple[int, int]:
        """How many groups hold an element that is not zero, and how many there are."""
        mine = {name: theta[name] for name in self.names([target])}
        alive = {
            name: encoded.replace(codes=elementwise(lambda c: (c != 0).float(), encoded.codes))
            for name, encoded in mine.items()
        }
        return super(GroupPrune, replace(self, criterion="max")).left(alive, target)

    def expand(self, target: Target, keep: Tensor, shape: torch.Size) -> Tensor:
        """Repeat each group's verdict over its elements."""
        part = self.grouping(target).expand(local(keep), part_shape(keep, shape))
        return like(part, keep, shape)

    # -- by what the loss feels ------------------------------------------------------------------

    def sums(self, target: Target, tensors: Mapping[str, Tensor]) -> Tensor:
        """The sum over all elements that go with a group, in the grid of groups."""
        grouping, weight = self.grouping(target), tensors[target.name]
        return grouping.split(weight)[0].sum(1).view(grouping.grid(weight.shape))

    def spread(
        self, target: Target, values: Tensor, theta: Mapping[str, Encoded]
    ) -> dict[str, Tensor]:
        """Tensors of the scored weights' shapes that hold one value for each group."""
        return {target.name: self.expand(target, values, theta[target.name].codes.shape)}

    def effects(
        self,
        targets: Sequence[Target],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """``Σ w·∂L/∂w`` over each group, with ``criterion="taylor"``.

        Raises:
            ValueError: If a weight is spread over processes (DTensor).
        """
        if self.criterion != "taylor":
            return {}
        found = {}
        for target in targets:
            names = self.names([target])
            if any(isinstance(weights[name], DTensor) for name in names):
                raise ValueError(
                    f"criterion='taylor' needs whole gradients, {target.name} is sharded: "
                    "choose 'l2', which the default L-C takes in a metric of gradients too"
                )
            if gradients.keys() >= set(names):
                found[target.name] = self.sums(
                    target, {n: weights[n].detach() * gradients[n] for n in names}
                )
        return found

    def judged(
        self,
        theta: Mapping[str, Encoded],
        targets: Sequence[Target],
        effects: Mapping[str, Tensor],
    ) -> dict[str, Encoded]:
        """Each group's effect in the place of its weights; zero for groups that are zero.

        A target that the loss does not reach (a frozen one) counts like the average group.

        Raises:
            NotFiniteError: If a weight is not finite, whatever its effect was before.
        """
        if not effects:
            return {}
        require_finite({name: theta[name].codes for name in self.names(targets)})
        average = torch.cat([e.flatten() for e in effects.values()]).mean()
        judged = {}
        for target in targets:
            there = self.scores(theta, target) > 0
            effect = effects.get(target.name, average).clamp(min=_FLOOR).expand(there.shape)
            for name, values in self.spread(target, effect * there, theta).items():
                judged[name] = theta[name].replace(codes=values)
        return judged

    def check(self, targets: Sequence[Target]) -> None:
        """Check too that ``align`` leaves something to prune."""
        super().check(targets)
        for pool in self.pools(targets):
            sizes = [self._groups_of(t) for t in pool.members]
            asked = self.counts(pool, sizes)[0]
            if asked < sum(sizes) and all(n <= self.align for n in sizes):
                raise ValueError(
                    f"align={self.align} keeps all {sum(sizes)} groups of "
                    f"{', '.join(t.name for t in pool.members)}, density={pool.density!r} asks for "
                    f"{asked}: take a smaller align"
                )

    def chosen(self, pool: Pool[Any], scores: list[Tensor]) -> list[Tensor]:
        """Which groups of a pool survive, by their scores; a multiple of ``align`` of each."""
        keep = super().chosen(pool, scores)
        if self.align == 1:
            return keep
        counts = count_nonzero(keep)
        return [self._aligned(s, n) for s, n in zip(scores, counts, strict=True)]

    def kept(self, pool: Pool[Any], sizes: list[int]) -> int:
        """How many groups of a pool survive; of several tensors before ``align`` counts."""
        count = super().kept(pool, sizes)
        return self._multiple(count, sizes[0]) if len(sizes) == 1 else count

    def _aligned(self, score: Tensor, count: int) -> Tensor:
        return topk_masks([score], self._multiple(count, score.numel()))[0]

    def _multiple(self, count: int, size: int) -> int:
        """The multiple of ``align`` next to a count, out of so many."""
        return min(max(round(count / self.align), 1) * self.align, size)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _slabs(weight: Tensor, extent: int | None, chunks: int = 1) -> Sequence[Tensor]:
    """Whole groups that stay in the cache; ``extent`` is that of a group, or all of them."""
    if extent is None:
        return (weight,)
    length = chunks * chunk_length(weight) * len(weight) // max(weight.numel(), 1)
    return torch.split(weight, max(length // extent, 1) * extent)


def _wide(weight: Tensor) -> Tensor:
    # In float32 at least: sums of squares of finite halves overflow, and round into ties.
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


@dataclass(frozen=True)
class BlockPrune(GroupPrune):
    """Remove rectangular blocks.

    Attributes:
        block_size: Extent of a block along each dimension of the weights, e.g. ``(4, 4)``.
            Blocks at a ragged edge are smaller and are scored by what they hold.
    """

    block_size: Sequence[int] = field(default=(4, 4))

    default_types: ClassVar[tuple[str, ...]] = LINEAR_TYPES

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.block_size
        valid = isinstance(given, Sequence) and all(isinstance(b, int) and b >= 1 for b in given)
        if not valid or not given:
            raise ValueError(f"block_size must hold ints >= 1, got {given!r}")
        object.__setattr__(self, "block_size", tuple(given))

    def grouping(self, target: Target) -> Grouping:
        """Blocks of ``block_size``."""
        return Blocks(tuple(self.block_size))


@dataclass(frozen=True)
class NMPrune(Scheme):
    """N:M sparsity: the ``n`` largest of every ``m`` consecutive inputs survive.

    Attributes:
        n: Kept in each group.
        m: Size of a group; must divide the input dimension of every selected weight.
    """

    n: int = 2
    m: int = 4

    order: ClassVar[int] = PRUNE
    default_types: ClassVar[tuple[str, ...]] = LINEAR_TYPES + CONV_TYPES[:3]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n <= self.m):
            raise ValueError(f"NMPrune needs integers 1 <= n <= m, got n={self.n!r}, m={self.m!r}")

    def check(self, targets: Sequence[Target]) -> None:
        """Check that ``m`` divides every input dimension."""
        for target in targets:
            if target.shape[1] % self.m:
                raise ValueError(
                    f"NMPrune({self.n}, {self.m}): m={self.m} does not divide the "
                    f"{target.shape[1]} inputs of {target.name} {target.shape}; "
                    f"leave it out with exclude="
                )

    def relaxed(self, progress: float) -> NMPrune:
        """``n`` part of the way down from ``m``."""
        return replace(self, n=round(self.m - (self.m - self.n) * progress))

    def compress(
        self, theta: Mapping[str, Encoded], targets: Sequence[Target]
    ) -> dict[str, Encoded]:
        """Zero all but the ``n`` largest of each group."""
        require_finite({t.name: theta[t.name].codes for t in targets})
        return {t.name: theta[t.name].masked(self._mask(t, theta[t.name].codes)) for t in targets}

    def _mask(self, target: Target, weight: Tensor) -> Tensor:
        unit = [self.m if dim == 1 else 1 for dim in range(weight.dim())]
        weight = uncut(weight, unit, target.name)
        return like(n_m_mask(local(weight), self.n, self.m), weight)
