"""Magnitude pruning to an exact density, element by element; base of the structured pruners."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_condensa.functional.ranks import count_nonzero
from lightning_condensa.functional.topk import topk_masks
from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.bound import PRUNE
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.finite import require_finite
from lightning_condensa.schemes.selection import SelectionError, Target, check_pattern
from lightning_condensa.schemes.space import Choice, Dimension, Range, is_dimension

P = TypeVar("P", bound="DensityPrune")
Density = float | Range | Choice


class Member(Protocol):
    """A tensor, or tensors that are pruned together."""

    @property
    def name(self) -> str:
        """For errors."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The names that overrides match."""
        ...


T = TypeVar("T", bound=Member)


@dataclass(frozen=True)
class Pool(Generic[T]):
    """What shares one threshold."""

    density: float
    members: tuple[T, ...]


@dataclass(frozen=True)
class DensityPrune(Scheme, ABC):
    """Keep the ``round(density × N)`` largest of N elements or groups; base of the pruners.

    Attributes:
        density: Share kept, in (0, 1], or a search dimension.
        scope: ``"global"``: one threshold over all selected tensors, as the paper does;
            ``"layer"``: one for each tensor.
        min_per_layer: Elements or groups that survive in every tensor whatever the threshold,
            a guard against layer collapse. The total stays exact.
        overrides: Regular expression → density, first match wins. The tensors of one pattern
            share a threshold of their own.
    """

    density: Density
    scope: Literal["global", "layer"] = field(default="global", kw_only=True)
    min_per_layer: int = field(default=1, kw_only=True)
    overrides: Mapping[str, Density] = field(default_factory=dict, kw_only=True, hash=False)

    order: ClassVar[int] = PRUNE
    #: Whether scores are compared by their magnitude.
    absolute: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density("density", self.density)
        if self.scope not in ("global", "layer"):
            raise ValueError(f"scope must be 'global' or 'layer', got {self.scope!r}")
        if not isinstance(self.min_per_layer, int) or self.min_per_layer < 0:
            raise ValueError(f"min_per_layer must be an int >= 0, got {self.min_per_layer!r}")
        object.__setattr__(self, "overrides", dict(self.overrides))
        for pattern, density in self.overrides.items():
            check_pattern("overrides", pattern)
            check_density(f"overrides[{pattern!r}]", density)

    # -- what a grouping defines -----------------------------------------------------------------

    @abstractmethod
    def score(self, target: Target, weight: Tensor) -> Tensor:
        """The importance of each element or group, any shape."""

    @abstractmethod
    def expand(self, target: Target, keep: Tensor, shape: torch.Size) -> Tensor:
        """The element mask of the weight from the mask over its scores."""

    # -- the projection --------------------------------------------------------------------------

    def compress(
        self, theta: Mapping[str, Encoded], targets: Sequence[Target]
    ) -> dict[str, Encoded]:
        """Zero what falls below the threshold of its pool; exact counts, ties cut in order."""
        return self.masked(theta, targets, self.keeps(theta, targets))

    def keeps(self, theta: Mapping[str, Encoded], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Which elements or groups of each target survive."""
        keeps: dict[str, Tensor] = {}
        for pool in self.pools(targets):
            require_finite({t.name: theta[t.name].codes for t in pool.members})
            scores = [self.scores(theta, t) for t in pool.members]
            names = [t.name for t in pool.members]
            keeps.update(zip(names, self.chosen(pool, scores), strict=True))
        return keeps

    def scores(self, theta: Mapping[str, Encoded], target: Target) -> Tensor:
        """The scores of a target's elements or groups: those of its weight."""
        return self.score(target, theta[target.name].codes)

    def masked(
        self,
        theta: Mapping[str, Encoded],
        targets: Sequence[Target],
        keeps: Mapping[str, Tensor],
    ) -> dict[str, Encoded]:
        """Encodings of the targets, and of what goes with them, without what does not survive."""
        return {
            t.name: theta[t.name].masked(self.expand(t, keeps[t.name], theta[t.name].codes.shape))
            for t in targets
        }

    def left(self, theta: Mapping[str, Encoded], target: Target) -> tuple[int, int]:
        """How many of a target's elements or groups are not zero, and how many there are."""
        scores = self.scores(theta, target)
        return count_nonzero([scores])[0], scores.numel()

    def chosen(self, pool: Pool[Any], scores: list[Tensor]) -> list[Tensor]:
        """Which elements or groups of a pool survive, by their scores."""
        k, floors = self.counts(pool, [s.numel() for s in scores])
        keep: list[Tensor] = topk_masks(scores, k, floors, absolute=self.absolute)
        return keep

    def counts(self, pool: Pool[Any], sizes: list[int]) -> tuple[int, list[int]]:
        """How many elements or groups a pool keeps in all, and in each member at least.

        Raises:
            ValueError: If it would keep less than the members need.
        """
        floors = [min(self.min_per_layer, n) for n in sizes]
        return _kept(pool, sum(sizes), sum(floors), self.min_per_layer), floors

    def kept(self, pool: Pool[Any], sizes: list[int]) -> int:
        """How many elements or groups of a pool survive, as far as their scores do not matter."""
        return self.counts(pool, sizes)[0]

    def pools(self, members: Sequence[T]) -> Iterator[Pool[T]]:
        """What shares a threshold.

        Raises:
            SelectionError: If an override matches no selected tensor.
        """
        pools: dict[str | None, list[T]] = {p: [] for p in (*self.overrides, None)}
        for member in members:
            matches = (p for p in self.overrides if any(re.search(p, n) for n in member.names))
            pools[next(matches, None)].append(member)
        for pattern, group in pools.items():
            if pattern is not None and not group:
                raise SelectionError(
                    f"overrides={pattern!r} matches no selected weight (or an earlier pattern "
                    f"took them all); there are {', '.join(m.name for m in members)}"
                )
            density = self.density if pattern is None else self.overrides[pattern]
            assert isinstance(density, int | float)
            if self.scope == "layer":
                yield from (Pool(density, (member,)) for member in group)
            elif group:
                yield Pool(density, tuple(group))

    def check(self, targets: Sequence[Target]) -> None:
        """Check that every pool keeps something of every tensor."""
        for pool in self.pools(targets):
            self._kept_of(pool)

    def _groups_of(self, target: Target) -> int:
        return self.score(target, torch.empty(target.shape, device="meta")).numel()

    def structure(self, targets: Sequence[Target]) -> object:
        """The count that each pool keeps: densities that round to the same count are the same."""
        counts = tuple(
            (tuple(t.name for t in pool.members), self._kept_of(pool))
            for pool in self.pools(targets)
        )
        return replace(self, density=1.0, overrides={}), counts

    def _kept_of(self, pool: Pool[Target]) -> int:
        return self.kept(pool, [self._groups_of(t) for t in pool.members])

    def relaxed(self: P, progress: float) -> P:
        """Density part of the way down from 1."""

        def ramp(density: Density) -> float:
            assert isinstance(density, int | float)
            return 1 - (1 - density) * progress

        overrides = {p: ramp(d) for p, d in self.overrides.items()}
        return replace(self, density=ramp(self.density), overrides=overrides)

    # -- search dimensions: overrides may hold some too ------------------------------------------

    def space(self) -> dict[str, Dimension]:
        """The open dimensions: ``density``, and ``density[pattern]`` for overrides."""
        inner: dict[str, Any] = {f"density[{p}]": d for p, d in self.overrides.items()}
        return super().space() | {name: d for name, d in inner.items() if is_dimension(d)}

    def at(self: P, values: Mapping[str, Any]) -> P:
        """The scheme with values for some dimensions."""
        self.check_dimensions(values)
        overrides = {p: values.get(f"density[{p}]", d) for p, d in self.overrides.items()}
        fields = super().space()
        own = {n: v for n, v in values.items() if n in fields}
        return replace(self, **own, overrides=overrides)


@dataclass(frozen=True)
class Prune(DensityPrune):
    """Unstructured magnitude pruning.

    Within its density it is the nearest sparse point in the Euclidean norm.

    Example:
        >>> bound = Prune(0.5).bind(torch.nn.Linear(4, 1, bias=False))
        >>> bound.pi({"weight": torch.tensor([[1.0, -4.0, 3.0, 0.5]])})["weight"].codes
        tensor([[ 0., -4.,  3.,  0.]])
    """

    absolute: ClassVar[bool] = True

    def score(self, target: Target, weight: Tensor) -> Tensor:
        """The weight itself, compared by magnitude."""
        return weight

    def expand(self, target: Target, keep: Tensor, shape: torch.Size) -> Tensor:
        """The mask itself."""
        return keep


def check_density(argument: str, density: object) -> None:
    """Raise ``ValueError`` unless ``density`` is a number in (0, 1], or dimensions of such."""
    values: Sequence[object] = (density,)
    if isinstance(density, Range):
        values = (density.low, density.high)
    elif isinstance(density, Choice):
        values = density.options
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < float(value) <= 1 or math.isnan(float(value)):  # type: ignore[arg-type]
            raise ValueError(
                f"{argument} must be a number in (0, 1], or a Range or Choice of such, "
                f"got {density!r}"
            )


def _kept(pool: Pool[Any], total: int, floor: int, min_per_layer: int) -> int:
    kept = round(pool.density * total)
    if kept < max(floor, 1):
        names = ", ".join(m.name for m in pool.members)
        raise ValueError(
            f"density={pool.density!r} keeps {kept} of {total} elements or groups of {names}, "
            f"fewer than the {max(floor, 1)} needed (min_per_layer={min_per_layer})"
        )
    return kept
