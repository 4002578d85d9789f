"""Rounding to narrow types: scales and codes of integer grids and of narrow floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_condensa.functional.chunks import chunk_length
from lightning_condensa.functional.ranks import Ranks

#: Least share of the scale that covers the largest magnitude that is tried, by the largest code.
_SHRINK = {1: 0.08, 7: 0.4, 15: 0.6}
#: How many scales are tried: the more, the more codes there are to be clipped one by one.
_CANDIDATES = {1: 8, 7: 16, 15: 16}
_REFINEMENTS = 3
#: Beyond 5 bits clipping below 90 % never pays: the grid is finer than the tail is long.
_FINE = (0.974, 0.948, 0.922)


def grid_scale(rows: Tensor, low: int, high: int, ranks: Ranks | None = None) -> Tensor:
    """Scale of each row that nearly minimizes the squared error of rounding to ``low … high``.

    Scales are tried from the one that just covers the largest magnitude downward, where clipping
    pays on heavy tails, and the best one is refined: for fixed codes q the best scale is
    ``Σ wq / Σ q²``. The covering scale is among them, so the result is never worse than min-max. No
    scale exceeds it either: an end of the grid is always used, and rounding again changes nothing.
    Scales are rounded to 17 significant bits: their products with codes are then exact in float32.

    Where the grid has one more code below zero, the scale is negative where the larger magnitudes
    are positive.

    Args:
        rows: ``(rows, size)``.
        low: Smallest code, ``-high`` or ``-high - 1``.
        high: Largest code, 127 for int8.
        ranks: The processes among which each row is cut, ``rows`` being this process's part; by
            default none. Errors are summed in double precision, so that the order of the sum, and
            with it the sharding, decides nothing but ties to 15 digits.

    Returns:
        float32 scales ``(rows, 1)``; 1 for rows that are all zero.

    Example:
        >>> grid_scale(torch.tensor([[-127.0, 64.0, 1.0]]), -127, 127)
        tensor([[1.]])
        >>> grid_scale(torch.tensor([[2.0, -1.0, 1.0]]), -2, 1)
        tensor([[-1.]])
    """
    ranks = ranks or Ranks()
    rows = rows.to(torch.float32)
    largest = ranks.maximum(_peak(rows))
    sign = torch.ones_like(largest)
    if low == -high:
        covering = largest / high
    else:
        least = ranks.maximum(_peak(rows.neg(), signed=True))
        most = ranks.maximum(_peak(rows, signed=True))
        sign = torch.where(most > least, -sign, sign)
        wider, narrower = torch.maximum(most, least), torch.minimum(most, least)
        covering = torch.maximum(wider / -low, narrower / high)
    # A denormal row would need a scale below the smallest float: it rounds to zero instead.
    full = _rounded(covering)
    full = torch.where(full > 0, full, torch.ones_like(full))
    best, best_error = sign * full, ranks.sum(_error(rows, sign * full, low, high))

    def attempt(scale: Tensor) -> None:
        nonlocal best, best_error
        scale = sign * torch.minimum(_rounded(scale), full)
        scale = torch.where(scale.abs() < torch.finfo(torch.float32).tiny, best, scale)
        error = ranks.sum(_error(rows, scale, low, high))
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)

    for shrink in _shrinks(high):
        attempt(full * shrink)
    if high <= 7:
        for _ in range(_REFINEMENTS):
            qw, qq = (ranks.sum(s) for s in _moments(rows, best, low, high))
            attempt((qw / qq.clamp_min(1)).to(torch.float32).abs())
    return best


def _shrinks(high: int) -> Sequence[float]:
    """Shares of the covering scale to try."""
    if high > 15:
        return _FINE
    levels = next(levels for levels in _SHRINK if high <= levels)
    count = _CANDIDATES[levels]
    return [_SHRINK[levels] ** (i / count) for i in range(1, count + 1)]


def mean_scale(rows: Tensor, sizes: Tensor, ranks: Ranks | None = None) -> Tensor:
    """Mean magnitude of each row: the best scale of the codes ±1 (Rastegari et al. 2016).

    Args:
        rows: ``(rows, size)``; what has no code is zero.
        sizes: ``(rows, 1)``, how many elements of each row have a code.
        ranks: See :func:`grid_scale`.

    Returns:
        float32 scales ``(rows, 1)``; 1 for rows that are all zero.

    Example:
        >>> mean_scale(torch.tensor([[3.0, -1.0, 0.0]]), torch.tensor([[2.0]]))
        tensor([[2.]])
    """
    ranks = ranks or Ranks()
    total = ranks.sum(rows.abs().sum(1, keepdim=True, dtype=torch.float64))
    count = ranks.sum(sizes.to(torch.float64))
    scale = _rounded((total / count.clamp_min(1)).to(torch.float32))
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def power_scale(rows: Tensor, dtype: torch.dtype, ranks: Ranks | None = None) -> Tensor:
    """The least power of two by which each row fits into a narrow float type.

    A power of two moves the exponent and rounds nothing.

    Args:
        rows: ``(rows, size)``.
        dtype: The type.
        ranks: See :func:`grid_scale`.

    Returns:
        float32 scales ``(rows, 1)``; 1 for rows that are all zero.

    Example:
        >>> power_scale(torch.tensor([[1000.0, 1.0]]), torch.float8_e4m3fn)
        tensor([[4.]])
    """
    ranks = ranks or Ranks()
    largest = ranks.maximum(_peak(rows.to(torch.float32)))
    mantissa, exponent = torch.frexp(largest / torch.finfo(dtype).max)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 127)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where(largest > 0, scale, torch.ones_like(scale))


def integer_codes(rows: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Nearest codes on the grid, ``clamp(round(w / scale), low, high)``, as int8."""
    return (rows.to(torch.float32) / scale).round_().clamp_(low, high).to(torch.int8)


def sign_codes(rows: Tensor) -> Tensor:
    """Codes ±1, +1 for zero, as int8."""
    return rows.ge(0).to(torch.int8).mul_(2).sub_(1)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest value of a narrower float type; what overflows becomes its largest finite value.

    ``-0.0`` becomes ``0.0``: a magnitude below the smallest number of the type is a zero, and a
    zero has one bit pattern.

    Example:
        >>> cast(torch.tensor([1e9, -1e-30]), torch.float16)
        tensor([65504.,     0.], dtype=torch.float16)
    """
    limit = torch.finfo(dtype).max
    if dtype.itemsize == 1:  # torch has no arithmetic on these
        # Their limits are exact in every wider type, unlike those of 16 bits in the other one.
        codes = weight.clamp(-limit, limit).to(dtype)
        return torch.where(codes.view(torch.int8) == -128, 0, codes.view(torch.int8)).view(dtype)
    # Cast first: in the type of the weight the limit itself might round up and overflow.
    return weight.to(dtype).clamp(-limit, limit).add_(0.0)


def _peak(rows: Tensor, signed: bool = False) -> Tensor:
    """Largest magnitude of each row, or largest value but at least 0, ``(rows, 1)``."""
    if rows.shape[1] == 0:  # a process may hold nothing of its rows
        return rows.new_zeros(len(rows), 1)
    return rows.amax(1, keepdim=True).clamp_min(0) if signed else rows.abs().amax(1, keepdim=True)


def _rounded(scale: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**17).round_() / 2**17, exponent)


def _error(rows: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """``Σ (qs − w)²`` of each row for its codes q, in double precision, ``(rows, 1)``."""

    def squares(codes: Tensor, piece: Tensor, step: Tensor) -> list[Tensor]:
        return [codes.mul_(step).sub_(piece).square_()]

    return _sums(rows, scale, low, high, squares)[0]


def _moments(rows: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """``Σ qw`` and ``Σ q²`` of each row for its codes q, in double precision, ``(rows, 1)``."""

    def products(codes: Tensor, piece: Tensor, step: Tensor) -> list[Tensor]:
        return [codes * piece, codes.square()]

    qw, qq = _sums(rows, scale, low, high, products)
    return qw, qq


def _sums(
    rows: Tensor,
    scale: Tensor,
    low: int,
    high: int,
    terms: Callable[[Tensor, Tensor, Tensor], list[Tensor]],
) -> list[Tensor]:
    """Sums over each row of some terms in its codes and values, piece by piece."""
    length = chunk_length(rows)
    height = max(length // max(rows.shape[1], 1), 1)
    parts: list[list[Tensor]] = []
    for part, step in zip(torch.split(rows, height), torch.split(scale, height), strict=True):
        found = []
        for piece in torch.split(part, length, dim=1):
            codes = (piece / step).round_().clamp_(low, high)
            values = terms(codes, piece, step)
            found.append([v.sum(1, keepdim=True, dtype=torch.float64) for v in values])
        parts.append([torch.stack(same).sum(0) for same in zip(*found, strict=True)])
    return [torch.cat(same) for same in zip(*parts, strict=True)]
