"""A search space of several dimensions: the product of a few levels along each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

__all__ = ["Axis", "Domain", "distinct"]


@dataclass(frozen=True)
class Axis:
    """The levels of one dimension, from the mildest to the strongest compression.

    Args:
        levels: Coordinates of each level, shape ``[L, k]``, float64: one column for a range, one
            0/1 column per option for a choice.
        origin: Coordinate at which a range does nothing, such as 0 for ``u = -ln(density)``; None
            for a choice.

    Raises:
        ValueError: If ``levels`` is not a matrix, or a range has not one column that grows.

    Example:
        >>> density = Axis(torch.tensor([[0.0], [0.7], [2.3]]), origin=0.0)
        >>> bits = Axis(torch.eye(2), origin=None)
        >>> len(density), bits.width
        (3, 2)
    """

    levels: Tensor
    origin: float | None

    def __post_init__(self) -> None:
        """Validate, and hold the levels in double precision."""
        if self.levels.ndim != 2 or self.levels.numel() == 0:
            raise ValueError(f"levels must have shape [L, k], got {list(self.levels.shape)}")
        object.__setattr__(self, "levels", self.levels.detach().to(torch.float64))
        if self.origin is not None:
            column = self.levels[:, 0]
            if self.width != 1 or bool((column.diff() <= 0).any()) or column[0] < self.origin:
                raise ValueError(
                    "levels of a range must be one column that grows from its origin, "
                    f"got {self.levels.tolist()} with origin={self.origin}"
                )

    def __len__(self) -> int:
        """The number of levels."""
        return len(self.levels)

    @property
    def width(self) -> int:
        """Columns of a point that belong to it."""
        return self.levels.shape[1]

    @property
    def is_range(self) -> bool:
        """Whether it is a range rather than a choice."""
        return self.origin is not None


@dataclass(frozen=True)
class Domain:
    """All combinations of levels, and what each is worth.

    A combination is a row of level numbers, an integer for each axis; its point is the row of the
    levels' coordinates, side by side.

    Args:
        axes: The dimensions; their columns in a point follow one another.
        utility: The known objective of combinations, ``[M, A]`` (int64) -> ``[M]``, higher is
            better. It is called on thousands of rows: where the objective is slow, an
            approximation.
        exact: The same without approximation, called on a few rows; None where ``utility`` is
            exact.
        further: The same combinations under further objectives.

    Example:
        >>> axis = Axis(torch.tensor([[0.0], [1.0], [2.0]]), origin=0.0)
        >>> domain = Domain((axis, axis), lambda level: level.double().sum(-1))
        >>> domain.points(torch.tensor([[0, 2]]))
        tensor([[0., 2.]], dtype=torch.float64)
        >>> domain.nearest(torch.tensor([[0.2, 1.9]])).tolist()
        [[0, 2]]
    """

    axes: tuple[Axis, ...]
    utility: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], Tensor] | None = None
    further: tuple[Domain, ...] = ()

    def all_exact(self) -> Domain | None:
        """The domain with no approximation; ``None`` where it has none anyway."""
        further = tuple(other.all_exact() or other for other in self.further)
        if self.exact is None and all(a is b for a, b in zip(further, self.further, strict=True)):
            return None
        return Domain(self.axes, self.exact or self.utility, None, further)

    def utilities(self, level: Tensor) -> Tensor:
        """Under all objectives: ``[M, A]`` -> ``[M, 1 + len(further)]``."""
        return torch.stack([self.utility(level), *(o.utility(level) for o in self.further)], dim=-1)

    @property
    def width(self) -> int:
        """Coordinates of a point."""
        return sum(axis.width for axis in self.axes)

    @property
    def sizes(self) -> Tensor:
        """Levels of each axis, shape ``[A]``."""
        return torch.tensor([len(axis) for axis in self.axes])

    @property
    def columns(self) -> tuple[slice, ...]:
        """Which columns of a point belong to each axis."""
        ends = torch.tensor([axis.width for axis in self.axes]).cumsum(0).tolist()
        return tuple(
            slice(end - axis.width, end) for axis, end in zip(self.axes, ends, strict=True)
        )

    def points(self, level: Tensor) -> Tensor:
        """The points of combinations ``[..., A]``; shape ``[..., d]``."""
        parts = [axis.levels[level[..., i]] for i, axis in enumerate(self.axes)]
        return torch.cat(parts, dim=-1)

    def nearest(self, points: Tensor) -> Tensor:
        """The combination next to each point ``[M, d]``; shape ``[M, A]``."""
        parts = points.to(torch.float64)
        found = [
            torch.cdist(parts[:, own], axis.levels).argmin(dim=-1)
            for axis, own in zip(self.axes, self.columns, strict=True)
        ]
        return torch.stack(found, dim=-1)

    def random(self, count: int, seed: int | None = None) -> Tensor:
        """Combinations spread evenly by a Sobol sequence, shape ``[count, A]``.

        Args:
            count: How many; equal ones may be among them.
            seed: Scrambles the sequence; None for the plain one.
        """
        engine = SobolEngine(len(self.axes), scramble=seed is not None, seed=seed)  # type: ignore[no-untyped-call]
        share = engine.draw(count, dtype=torch.float64)
        return torch.minimum((share * self.sizes).long(), self.sizes - 1)

    def diagonals(self) -> Tensor:
        """One strength for all: ranges at equal distance from their origins, choices alike.

        Ranges go together as far as each reaches, so that groups of a network get one density;
        choices take the same level number. Shape ``[M, A]``.
        """
        ranges = [axis for axis in self.axes if axis.is_range]
        choices = max((len(axis) for axis in self.axes if not axis.is_range), default=1)
        distances = _distances(ranges) if ranges else torch.zeros(1, dtype=torch.float64)
        columns = []
        for axis in self.axes:
            if axis.origin is None:
                column = torch.arange(choices).clamp(max=len(axis) - 1)
                columns.append(column.repeat(len(distances)))
            else:
                gap = (axis.levels[:, 0] - axis.origin - distances[:, None]).abs()
                columns.append(gap.argmin(dim=-1).repeat_interleave(choices))
        return distinct(torch.stack(columns, dim=-1))


def distinct(level: Tensor) -> Tensor:
    """Combinations ``[M, A]`` without those that are there already, in a fixed order."""
    found: Tensor = level.unique(dim=0)  # type: ignore[no-untyped-call]
    return found


def _distances(ranges: Sequence[Axis]) -> Tensor:
    """Distances from the origin of the axis that reaches farthest."""

    def distances(axis: Axis) -> Tensor:
        assert axis.origin is not None  # a range
        return axis.levels[:, 0] - axis.origin

    return max(map(distances, ranges), key=lambda distance: float(distance[-1]))
