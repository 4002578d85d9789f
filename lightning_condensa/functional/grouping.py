"""Views of a weight as groups: ``split`` into rows of a matrix, ``expand`` a group mask back.

A grouping says which elements live and die together. It knows nothing of how they are scored or
how many survive, so every grouping works with every criterion and every density.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as nnf

from lightning_condensa.functional.criteria import Reduction

#: Up to so many slices are joined, and written, one by one faster than along their dimension.
_FEW = 8


class Grouping(Protocol):
    """A partition of a tensor's elements into groups; sizes are float32."""

    def unit(self, shape: torch.Size) -> tuple[int | None, ...]:
        """Extent of a group along each dimension, ``None`` for all of it.

        A part of a tensor that cuts no group is split like the whole.
        """
        ...

    def grid(self, shape: torch.Size) -> tuple[int, ...]:
        """How many groups there are along each dimension of a grid of groups."""
        ...

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The groups as rows ``(groups, size)``, zero-padded, and real sizes ``(groups, 1)``."""
        ...

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """Element mask of ``shape`` from a mask over groups, flat or in their grid."""
        ...


@dataclass(frozen=True)
class Slices:
    """One group per output unit: row of a Linear, filter of a convolution.

    Attributes:
        transposed: The layout of transposed convolutions, ``(in, out / groups, *kernel)``.
        groups: Groups of a transposed convolution.
    """

    transposed: bool = False
    groups: int = 1

    def unit(self, shape: torch.Size) -> tuple[int | None, ...]:
        """One output unit, and all of the other dimensions."""
        return tuple(1 if dim == int(self.transposed) else None for dim in range(len(shape)))

    def grid(self, shape: torch.Size) -> tuple[int, ...]:
        """The output units; of a transposed convolution ``(groups, out / groups)``."""
        return (self.groups, shape[1]) if self.transposed else (shape[0],)

    def _rows(self, weight: Tensor) -> Tensor:
        if not self.transposed:
            return weight.flatten(1)
        grouped = torch.unflatten(weight, 0, (self.groups, weight.shape[0] // self.groups))
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """One row per group."""
        rows = self._rows(weight)
        return rows, _full_sizes(rows)

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """Repeat each unit's verdict over its weights."""
        trailing = [1] * (len(shape) - 2)
        if not self.transposed:
            return keep.view(-1, 1, *trailing).expand(shape)
        per_group = keep.view(self.groups, 1, shape[1])
        inputs = shape[0] // self.groups
        return (
            per_group.expand(self.groups, inputs, shape[1])
            .reshape(shape[0], shape[1], *trailing)
            .expand(shape)
        )


@dataclass(frozen=True)
class Rows:
    """The whole tensor, or what belongs to one index of a dimension; parts may be empty.

    Attributes:
        dim: That dimension, ``None`` for the whole tensor.
    """

    dim: int | None = None

    def grid(self, shape: torch.Size) -> tuple[int, ...]:
        """One along each dimension but ``dim``."""
        return tuple(n if d == self.dim else 1 for d, n in enumerate(shape))

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """One row per index."""
        first = weight[None] if self.dim is None else weight.movedim(self.dim, 0)
        rows = first.flatten(1)
        return rows, _full_sizes(rows)

    def join(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of ``shape`` whose rows are those of :meth:`split`."""
        if self.dim is None:
            return rows.reshape(shape)
        first = torch.empty(shape, device="meta").movedim(self.dim, 0).shape
        return rows.reshape(first).movedim(0, self.dim).contiguous()


@dataclass(frozen=True)
class Blocks:
    """Rectangular blocks; those at a ragged edge are smaller.

    Attributes:
        block_size: Extent along each dimension, as many as the weight has.
    """

    block_size: tuple[int, ...]

    def unit(self, shape: torch.Size) -> tuple[int | None, ...]:
        """The block."""
        return self.block_size

    def grid(self, shape: torch.Size) -> tuple[int, ...]:
        """Blocks along each dimension.

        Raises:
            ValueError: If blocks have more or fewer dimensions than the weight.
        """
        if len(shape) != len(self.block_size):
            raise ValueError(
                f"block_size must have {len(shape)} entries for a weight of shape "
                f"{tuple(shape)}, got {self.block_size}"
            )
        return tuple(math.ceil(n / b) for n, b in zip(shape, self.block_size, strict=True))

    def _interleaved(self, weight: Tensor) -> Tensor:
        """The weight, padded, with two dimensions for each: which block, and where in it."""
        counts = self.grid(weight.shape)
        pads = [c * b - n for n, b, c in zip(weight.shape, self.block_size, counts, strict=True)]
        if any(pads):
            weight = nnf.pad(weight, [p for pad in reversed(pads) for p in (0, pad)])
        pairs = zip(counts, self.block_size, strict=True)
        return weight.reshape([extent for pair in pairs for extent in pair])

    def sizes(self, weight: Tensor) -> Tensor:
        """How many weights each block holds, ``(groups, 1)``."""
        sizes = torch.ones(1, device=weight.device)
        counts = self.grid(weight.shape)
        for n, b, count in zip(weight.shape, self.block_size, counts, strict=True):
            extents = (n - b * torch.arange(count, device=weight.device)).clamp(max=b)
            sizes = torch.outer(sizes, extents).flatten()
        return sizes[:, None]

    def reduce(self, values: Tensor, criterion: Reduction) -> Tensor:
        """Each block's values reduced, dimension by dimension: several times faster than as rows.

        Args:
            values: What each weight counts, of the weight's shape.
            criterion: How to reduce.

        Returns:
            ``(groups,)``
        """
        reduced = self._interleaved(values)
        for dim, extent in enumerate(self.block_size, start=1):
            if extent <= _FEW:
                reduced = functools.reduce(criterion.join, reduced.unbind(dim))
            else:
                reduced = criterion.reduce(reduced, dim)
        return reduced.flatten()

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """One row per group."""
        split = self._interleaved(weight)
        which, within = (list(range(first, split.dim(), 2)) for first in (0, 1))
        rows = split.permute(*which, *within)
        sizes = self.sizes(weight)
        shape = (len(sizes), math.prod(self.block_size))
        if rows.is_contiguous():
            return rows.view(shape), sizes
        # Blocks side by side in memory: what is done to each of them runs along it.
        columns = split.permute(*within, *which)
        return columns.reshape(shape[::-1]).t(), sizes

    def join(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of ``shape`` whose blocks are the rows of :meth:`split`."""
        counts = self.grid(shape)
        dims = len(shape)
        order = [axis for dim in range(dims) for axis in (dim, dims + dim)]
        padded = [c * b for c, b in zip(counts, self.block_size, strict=True)]
        whole = rows.reshape(*counts, *self.block_size).permute(order).reshape(padded)
        return whole[tuple(slice(n) for n in shape)].contiguous()

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """Repeat each block's verdict over its weights."""
        mask = keep.view(self.grid(shape))
        for dim in reversed(range(len(shape))):  # the last one first: then whole rows are copied
            extent = self.block_size[dim]
            if extent <= _FEW:
                repeated = torch.stack([mask] * extent, dim + 1)
            else:
                sizes = [-1] * (dim + 1) + [extent] + [-1] * (len(shape) - dim - 1)
                repeated = mask.unsqueeze(dim + 1).expand(sizes)
            mask = repeated.flatten(dim, dim + 1).narrow(dim, 0, shape[dim])
        return mask


def _full_sizes(rows: Tensor) -> Tensor:
    return torch.full((rows.shape[0], 1), float(rows.shape[1]), device=rows.device)


def n_m_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Keep the ``n`` largest magnitudes of every ``m`` consecutive inputs (N:M sparsity).

    Inputs are the second dimension (features of a Linear, channels of a convolution), which is how
    sparse tensor cores read them (Mishra et al., "Accelerating Sparse Deep Neural Networks",
    arXiv:2104.08378). Of equal magnitudes the first survive.

    Args:
        weight: ``(out, in, *kernel)``.
        n: Kept per group, ``1 <= n <= m``.
        m: Group size; must divide ``in``.

    Returns:
        Boolean mask of the weight's shape.

    Raises:
        ValueError: If ``m`` does not divide the input dimension.

    Example:
        >>> n_m_mask(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), 2, 4)
        tensor([[False,  True,  True, False]])
    """
    if weight.dim() < 2 or weight.shape[1] % m:
        raise ValueError(f"m={m} must divide the input dimension of shape {tuple(weight.shape)}")
    inputs_last = weight.abs().movedim(1, -1)
    groups = inputs_last.reshape(-1, m)
    order = groups.sort(dim=1, descending=True, stable=True).indices[:, :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
    return mask.reshape(inputs_last.shape).movedim(-1, 1).contiguous()
