"""Several objectives at once: fronts, hypervolumes, and where a front bends."""

from __future__ import annotations

import torch
from botorch.utils.multi_objective.box_decompositions.non_dominated import (
    FastNondominatedPartitioning,
)
from torch import Tensor

__all__ = ["front", "gains", "hypervolume", "knee"]


def front(values: Tensor) -> Tensor:
    """Which rows no other dominates: at least as good in all columns, better in one.

    Args:
        values: Shape ``[N, m]``, higher is better.

    Returns:
        Shape ``[N]``; of equal rows all.

    Example:
        >>> front(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])).tolist()
        [True, True, False]
    """
    other, own = values.unsqueeze(0), values.unsqueeze(1)
    dominated = (other >= own).all(dim=-1) & (other > own).any(dim=-1)
    return ~dominated.any(dim=-1)


def gains(values: Tensor, others: Tensor, reference: Tensor) -> Tensor:
    """By how much each row would enlarge the hypervolume of others.

    Exact: the region that they do not dominate is divided into boxes once (Lacour et al., 2017).

    Args:
        values: Shape ``[N, m]``, higher is better.
        others: Shape ``[F, m]``; need not be a front.
        reference: Where volumes begin, shape ``[m]``.

    Returns:
        Shape ``[N]``, 0 for rows that are not beyond the reference in every column.

    Example:
        >>> one = torch.tensor([[1.0, 1.0]]).double()
        >>> gains(torch.tensor([[2.0, 2.0], [0.5, 2.0]]).double(), one, torch.zeros(2).double())
        tensor([3.0000, 0.5000], dtype=torch.float64)
    """
    boxes = FastNondominatedPartitioning(ref_point=reference, Y=others)
    lower, upper = boxes.get_hypercell_bounds()
    sides = torch.minimum(values.unsqueeze(-2), upper) - lower
    found: Tensor = sides.clamp(min=0).prod(dim=-1).sum(dim=-1)
    return found


def hypervolume(values: Tensor, reference: Tensor) -> float:
    """The volume that rows dominate, above a reference.

    Args:
        values: Shape ``[N, m]``, higher is better.
        reference: Shape ``[m]``.

    Example:
        >>> hypervolume(torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double(), torch.zeros(2).double())
        3.0
    """
    total, before = 0.0, values.new_empty(0, len(reference))
    for row in values[front(values)] if len(values) else values:
        total += float(gains(row[None], before, reference))
        before = torch.cat([before, row[None]])
    return total


def knee(values: Tensor) -> int:
    """The row where a front bends most: farthest beyond the plane through its extremes.

    With each column scaled to [0, 1] over the front, that is the greatest sum (for two columns the
    greatest distance to the line between both ends; Das, On characterizing the "knee" of the
    Pareto curve, 1999).

    Args:
        values: A front, shape ``[N, m]`` with ``N >= 1``, higher is better.

    Returns:
        The row; the first of equals.

    Example:
        >>> knee(torch.tensor([[0.0, 3.0], [2.5, 2.5], [3.0, 0.0]]))
        1
    """
    low, high = values.aminmax(dim=0)
    return int(((values - low) / (high - low).clamp(min=1e-12)).sum(dim=-1).argmax())
