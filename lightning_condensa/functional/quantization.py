"""Rounding to narrow types: scales and codes of symmetric integer grids, float casts."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_condensa.functional.chunks import chunk_length
from lightning_condensa.functional.ranks import Ranks


def symmetric_scale(
    rows: Tensor, levels: int, candidates: int = 24, ranks: Ranks | None = None
) -> Tensor:
    """Scale of each row that minimizes the squared rounding error on the grid ``±levels``.

    The error is compared at ``candidates`` scales from the one that just covers the largest
    magnitude down to 40 % of it, where clipping pays on heavy tails; the min-max scale is among
    them, so the result is never worse than min-max. Scales are rounded to 17 significant bits:
    their products with codes are then exact in float32, and rounding again changes nothing.

    Args:
        rows: ``(rows, size)``.
        levels: Largest code, 127 for int8.
        candidates: How many scales to try.
        ranks: The processes among which each row is cut, ``rows`` being this process's part; by
            default none. Errors are summed in double precision, so that the order of the sum, and
            with it the sharding, decides nothing but ties to 15 digits.

    Returns:
        float32 scales ``(rows, 1)``; 1 for rows that are all zero.

    Example:
        >>> symmetric_scale(torch.tensor([[-127.0, 64.0, 1.0]]), 127)
        tensor([[1.]])
    """
    ranks = ranks or Ranks()
    rows = rows.to(torch.float32)
    empty = rows.shape[1] == 0  # a process may hold nothing of its rows
    part = rows.new_zeros(len(rows), 1) if empty else rows.abs().amax(1, keepdim=True)
    largest = ranks.maximum(part)
    # A denormal row would need a scale below the smallest float: it rounds to zero instead.
    full = _rounded(largest / levels)
    full = torch.where(full > 0, full, torch.ones_like(full))
    best, best_error = full, ranks.sum(_rounding_error(rows, full, levels))
    for shrink in torch.linspace(1.0, 0.4, candidates).tolist()[1:]:
        # Beyond 5 bits clipping below 90 % never pays: the grid is finer than the tail is long.
        if levels > 15 and shrink < 0.9:
            break
        scale = _rounded(full * shrink).clamp_min(torch.finfo(torch.float32).tiny)
        error = ranks.sum(_rounding_error(rows, scale, levels))
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)
    return best


def _rounded(scale: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**17).round_() / 2**17, exponent)


def integer_codes(rows: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Nearest codes on the grid, ``clamp(round(w / scale), ±levels)``, as int8."""
    return (rows.to(torch.float32) / scale).round_().clamp_(-levels, levels).to(torch.int8)


def _rounding_error(rows: Tensor, scale: Tensor, levels: int) -> Tensor:
    length = chunk_length(rows)
    height = max(length // max(rows.shape[1], 1), 1)
    errors = []
    for part, step in zip(torch.split(rows, height), torch.split(scale, height), strict=True):
        errors.append(torch.zeros_like(step, dtype=torch.float64))
        for piece in torch.split(part, length, dim=1):
            codes = (piece / step).round_().clamp_(-levels, levels)
            squares = codes.mul_(step).sub_(piece).square_()
            errors[-1] += squares.sum(1, keepdim=True, dtype=torch.float64)
    return torch.cat(errors)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest value of a narrower float type; what overflows becomes its largest finite value.

    ``-0.0`` becomes ``0.0``: a magnitude below the smallest number of the type is a zero, and a
    zero has one bit pattern.

    Example:
        >>> cast(torch.tensor([1e9, -1e-30]), torch.float16)
        tensor([65504.,     0.], dtype=torch.float16)
    """
    limit = torch.finfo(dtype).max
    # Cast first: in the type of the weight the limit itself might round up and overflow.
    return weight.to(dtype).clamp(-limit, limit).add_(0.0)
