"""Euclidean norms over many tensors, spread over processes or not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_condensa.functional.placement import local
from lightning_condensa.functional.ranks import Ranks


def norm(tensors: Iterable[Tensor]) -> float:
    """The norm of all elements together; 0 of none.

    For DTensors a collective call. The device is waited for once.

    Example:
        >>> norm([torch.tensor([3.0]), torch.tensor([4.0])])
        5.0
    """
    given = list(tensors)
    ranks = Ranks.holding(given)
    parts = [local(t) for t in given if ranks.own(t)]
    norms = [torch.linalg.vector_norm(p, dtype=_wide(p)).to(torch.float64) for p in parts]
    device = norms[0].device if norms else ranks.device
    square = torch.zeros((), dtype=torch.float64, device=device)
    for value in norms:
        square = square + value.to(device).square()
    return float(ranks.sum(square).sqrt())


def relative(distance: float, length: float) -> float:
    """``distance / length``, finite also where the length is zero."""
    return distance / max(length, torch.finfo(torch.float32).tiny)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
