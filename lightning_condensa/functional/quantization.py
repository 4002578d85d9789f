"""Rounding to narrow types: scales and codes of integer grids and of narrow floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_condensa.functional.chunks import chunk_length
from lightning_condensa.functional.masks import greater
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

    def allowed(scale: Tensor) -> Tensor:
        scale = sign * torch.minimum(_rounded(scale), full)
        return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, sign * full, scale)

    tried = allowed(full * full.new_tensor([1.0, *_shrinks(high)]))
    errors = ranks.sum(_errors(rows, tried, low, high))
    least = errors.argmin(1, keepdim=True)  # the first of equals
    best, best_error = tried.gather(1, least), errors.gather(1, least)
    for _ in range(_REFINEMENTS if high <= 7 else 0):
        qw, qq = ranks.sum(_moments(rows, best, low, high))
        scale = allowed((qw / qq.clamp_min(1)).to(torch.float32).abs())
        error = ranks.sum(_errors(rows, scale, low, high))
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)
    return best


def held_scale(
    rows: Tensor, thresholds: Tensor, ranks: Ranks | None = None
) -> tuple[Tensor, Tensor]:
    """Codes −1, 0 and 1 of each row by a given threshold, and the scale that is best for them.

    Args:
        rows: ``(rows, size)``.
        thresholds: ``(rows, 1)``, of magnitudes, in units of the root mean square of the row.
        ranks: See :func:`grid_scale`.

    Returns:
        int8 codes ``(rows, size)`` and float32 scales ``(rows, 1)``, the mean magnitude of what is
        above the threshold; 1 for rows of zeros.

    Example:
        >>> held_scale(torch.tensor([[3.0, 0.0, -4.0, 0.0]]), torch.tensor([[0.5]]))
        (tensor([[ 1,  0, -1,  0]], dtype=torch.int8), tensor([[3.5000]]))
    """
    threshold = thresholds * root_mean_square(rows, ranks)
    codes = (rows > threshold).to(torch.int8) - (rows < -threshold).to(torch.int8)
    return codes, mean_scale(rows * codes.abs(), codes.abs().sum(1, keepdim=True), ranks)


def threshold_of(rows: Tensor, scale: Tensor, ranks: Ranks | None = None) -> Tensor:
    """What :func:`held_scale` takes, where codes −1, 0 and 1 times a scale are the nearest.

    Args:
        rows: ``(rows, size)``.
        scale: ``(rows, 1)``, positive.
        ranks: See :func:`grid_scale`.

    Returns:
        ``(rows, 1)``; ½ for rows of zeros.

    Example:
        >>> threshold_of(torch.tensor([[3.0, 0.0, -3.0, 0.0]]), torch.tensor([[3.0]]))
        tensor([[0.7071]])
    """
    unit = root_mean_square(rows, ranks)
    shown = unit > torch.finfo(torch.float32).tiny
    return torch.where(shown, scale / (2 * unit), torch.full_like(unit, 0.5))


def root_mean_square(rows: Tensor, ranks: Ranks | None = None) -> Tensor:
    """Root mean square of each row, float32 ``(rows, 1)``; see :func:`grid_scale` for ``ranks``."""
    ranks = ranks or Ranks()
    squares = ranks.sum(_totals(rows, Tensor.square_))
    sizes = ranks.sum(torch.full_like(squares, rows.shape[1]))
    return (squares / sizes.clamp_min(1)).sqrt().to(torch.float32)


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
    total = ranks.sum(_totals(rows, Tensor.abs_))
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
    codes = torch.empty_like(rows, dtype=torch.int8)
    for at in _pieces(rows):
        exact = rows[at].to(torch.float32) / scale[at[0]]
        codes[at] = exact.round_().clamp_(low, high)
    return codes


def float_codes(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest values of a narrow float type to ``w / scale``, ``(rows, size)``."""
    codes = torch.empty_like(rows, dtype=dtype)
    for at in _pieces(rows):
        codes[at] = cast(rows[at].to(torch.float32) / scale[at[0]], dtype)
    return codes


def sign_codes(rows: Tensor) -> Tensor:
    """Codes ±1, +1 for zero, as int8."""
    codes = torch.empty_like(rows, dtype=torch.int8)
    for at in _pieces(rows):
        piece = torch.empty_like(codes[at], dtype=torch.bool)
        greater(rows[at].to(torch.float32), 0.0, piece, or_equal=True)
        codes[at] = piece.view(torch.int8).mul_(2).sub_(1)
    return codes


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
        bits = codes.view(torch.int8)
        bits.mul_(bits.clone().ne_(-128))  # ones and zeros: a CPU is slow on booleans
        return codes
    # Cast first: in the type of the weight the limit itself might round up and overflow.
    return weight.to(dtype).clamp(-limit, limit).add_(0.0)


def _peak(rows: Tensor, signed: bool = False) -> Tensor:
    """Largest magnitude of each row, or largest value but at least 0, ``(rows, 1)``."""
    if rows.shape[1] == 0:  # a process may hold nothing of its rows
        return rows.new_zeros(len(rows), 1)
    most = rows.amax(1, keepdim=True).clamp_min(0)
    return most if signed else torch.maximum(most, rows.amin(1, keepdim=True).neg())


def _totals(rows: Tensor, term: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over each row of what an operation in place makes of its values, in double precision."""
    total = rows.new_zeros(len(rows), 1, dtype=torch.float64)
    for at in _pieces(rows):
        total[at[0]] += term(rows[at].to(torch.float64, copy=True)).sum(1, keepdim=True)
    return total


def _rounded(scale: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**17).round_() / 2**17, exponent)


def _errors(rows: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """``Σ (qs − w)²`` of each row for its codes q, for each of its scales, in double precision."""

    def square(codes: Tensor, piece: Tensor, step: Tensor) -> Tensor:
        return codes.mul_(step).sub_(piece).square_()

    return _sums(rows, scales, low, high, [square])[0]


def _moments(rows: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """``Σ qw`` and ``Σ q²`` of each row for its codes q, in double precision, ``(2, rows, 1)``."""

    def product(codes: Tensor, piece: Tensor, step: Tensor) -> Tensor:
        return codes * piece

    def square(codes: Tensor, piece: Tensor, step: Tensor) -> Tensor:
        return codes.square_()

    return _sums(rows, scale, low, high, [product, square])


def _sums(
    rows: Tensor,
    scales: Tensor,
    low: int,
    high: int,
    terms: Sequence[Callable[[Tensor, Tensor, Tensor], Tensor]],
) -> Tensor:
    """Sums over each row of terms in its codes, values and scale, ``(terms, *scales.shape)``.

    Piece by piece, and each for all scales while it is in the cache. The last term may overwrite
    the codes.
    """
    totals = rows.new_zeros(len(terms), *scales.shape, dtype=torch.float64)
    for top, left in _pieces(rows):
        piece = rows[top, left]
        codes, sums = torch.empty_like(piece), []
        for step in torch.split(scales[top], 1, dim=1):
            torch.div(piece, step, out=codes).round_().clamp_(low, high)
            sums += [term(codes, piece, step).sum(1, dtype=torch.float64) for term in terms]
        by_scale = torch.unflatten(torch.stack(sums), 0, (-1, len(terms)))
        totals[:, top] += by_scale.permute(1, 2, 0)
    return totals


def _pieces(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Where to cut a matrix into pieces that stay in the cache."""
    length = 2 * chunk_length(rows)  # there are many small operations on each
    height = max(length // max(rows.shape[1], 1), 1)
    for top in range(0, rows.shape[0], height):
        for left in range(0, rows.shape[1], length):
            yield slice(top, top + height), slice(left, left + length)
