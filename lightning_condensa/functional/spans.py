"""A view of a weight whose groups are made of several spans: heads of attention, hidden units."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """One group per span of a dimension, from each of several consecutive sections of it.

    A section is cut into ``count`` equal spans, and group i is made of the i-th span of every
    section: of a fused attention projection, the queries, the keys and the values of head i. What
    lies behind the last section is in no group, and always kept.

    Attributes:
        count: How many groups there are.
        sections: Extents of the sections, multiples of ``count``.
        dim: The dimension that they divide.

    Example:
        >>> heads = Spans(2, sections=(4, 2))
        >>> heads.expand(torch.tensor([True, False]), torch.Size([7, 1])).flatten().tolist()
        [True, True, False, False, True, False, True]
    """

    count: int
    sections: tuple[int, ...]
    dim: int = 0

    def unit(self, shape: torch.Size) -> tuple[int | None, ...]:
        """A span, and all of the other dimensions; no dimension may be cut where there are more."""
        single = self.sections == (shape[self.dim],)
        span = self.sections[0] // self.count if single else None
        return tuple(span if dim == self.dim else None for dim in range(len(shape)))

    def grid(self, shape: torch.Size) -> tuple[int, ...]:
        """The groups in a row."""
        return (self.count,)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """One row per group: its spans one after the other."""
        covered = weight.movedim(self.dim, 0)[: sum(self.sections)]
        sections = torch.split(covered, list(self.sections))
        spans = [torch.unflatten(section, 0, (self.count, -1)).flatten(1) for section in sections]
        rows = torch.cat(spans, dim=1)
        return rows, torch.full((self.count, 1), float(rows.shape[1]), device=rows.device)

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """Repeat each group's verdict over its spans."""
        spans = [keep.repeat_interleave(extent // self.count) for extent in self.sections]
        rest = keep.new_ones(shape[self.dim] - sum(self.sections))
        along = [-1 if dim == self.dim else 1 for dim in range(len(shape))]
        return torch.cat([*spans, rest]).view(along).expand(shape)
