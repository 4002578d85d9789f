"""The k-th largest of very many scores, without sorting, copying or gathering them.

The k-th largest value is bracketed from a small strided sample (Floyd & Rivest, "Expected time
bounds for selection", CACM 1975), the scores above the bracket are counted in one pass, and only
the few inside it are looked at again. The answer is exact for every input: where a bracket misses,
or a value is tied many times over, the search goes on in what is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from lightning_condensa.functional.chunks import chunk_length
from lightning_condensa.functional.masks import between
from lightning_condensa.functional.placement import local
from lightning_condensa.functional.ranks import Ranks

#: Scores that are worth no sample.
_FEW = 1 << 14


@dataclass(frozen=True)
class Parts:
    """What this process holds of some scores, and the processes that hold the rest.

    Attributes:
        pieces: A flat tensor for each; empty where another process counts these elements.
        dtype: A type that holds every score exactly: a threshold is never rounded.
        absolute: Whether magnitudes are compared; they are taken chunk by chunk.
        ranks: Who shares the scores.
    """

    pieces: tuple[Tensor, ...]
    dtype: torch.dtype
    absolute: bool
    ranks: Ranks

    @classmethod
    def of(cls, scores: Sequence[Tensor], absolute: bool) -> Parts:
        """The parts of some tensors, plain ones or DTensors."""
        ranks = Ranks.holding(scores)
        flat = [local(s).detach().reshape(-1) for s in scores]
        pieces = (f if ranks.own(s) else f[:0] for f, s in zip(flat, scores, strict=True))
        dtype = reduce(torch.promote_types, {s.dtype for s in scores}, torch.float32)
        return cls(tuple(pieces), dtype, absolute, ranks)

    def only(self, which: Sequence[int]) -> Parts:
        """The parts of some of the tensors."""
        return replace(self, pieces=tuple(self.pieces[i] for i in which))

    def chunks(self, piece: Tensor) -> Iterator[Tensor]:
        """A piece in order, as short tensors of ``dtype``."""
        for chunk in torch.split(piece, chunk_length(piece)):
            yield (chunk.abs() if self.absolute else chunk).to(self.dtype)

    @property
    def held(self) -> int:
        """How many scores this process counts."""
        return sum(piece.numel() for piece in self.pieces)

    def compare(self, value: float) -> tuple[list[int], list[int]]:
        """How many scores of each piece exceed a value, and how many equal it."""
        above, equal = [0] * len(self.pieces), [0] * len(self.pieces)
        for i, piece in enumerate(self.pieces):
            for chunk in self.chunks(piece):
                above[i] += int((chunk > value).count_nonzero())
                equal[i] += int((chunk == value).count_nonzero())
        return above, equal

    def select(self, first: float, last: float) -> tuple[list[int], Parts]:
        """How many scores of each piece exceed ``last``, and those from ``first`` to ``last``."""
        above, inside = [], []
        for piece in self.pieces:
            count, found = 0, [piece.new_empty(0, dtype=self.dtype)]
            for chunk in self.chunks(piece) if first <= last else ():
                chosen, more = between(chunk, first, last)
                found.append(chosen)
                count += more
            above.append(count)
            inside.append(torch.cat(found))
        return above, replace(self, pieces=tuple(inside), absolute=False)

    def next(self, value: float, toward: float) -> float:
        """The number of ``dtype`` next to a value."""
        return float(torch.tensor(value, dtype=self.dtype).nextafter(torch.tensor(toward)))


@dataclass(frozen=True)
class Band:
    """The few scores strictly between two values.

    Attributes:
        low: Value below them.
        high: Value above them.
        above: How many scores of each piece are at least ``high``.
        inside: The scores between.
    """

    low: float
    high: float
    above: list[int]
    inside: Parts

    def only(self, which: Sequence[int]) -> Band:
        """The band of some of the tensors."""
        return replace(self, above=[self.above[i] for i in which], inside=self.inside.only(which))


def sample_size(total: int) -> int:
    """How many scores a bracket is drawn from: Floyd and Rivest's optimum grows as ``total^⅔``."""
    return max(round(math.pow(total, 2 / 3)), _FEW)


def narrow(scores: Parts, k: int, total: int) -> Band | None:
    """The scores around the ``k``-th largest of ``total``; nothing where there are few in all."""
    if total <= _FEW:
        return None
    low, high = _bracket(scores, k, total)
    first, last = scores.next(low, math.inf), scores.next(high, -math.inf)
    return Band(low, high, *scores.select(first, last))


def kth(
    scores: Parts, k: int, total: int, band: Band | None = None
) -> tuple[float, list[int], list[int]]:
    """The ``k``-th largest score of all processes.

    Args:
        scores: Floating point numbers, no NaN among them.
        k: Rank, from 1 to ``total``.
        total: The number of scores on all processes.
        band: What :func:`narrow` made of these scores for a rank near ``k``.

    Returns:
        The value, and of each piece how many scores exceed it and how many equal it.
    """
    passed = [0] * len(scores.pieces)  # scores above all those still looked at
    ranks = scores.ranks
    band = band or narrow(scores, k, total)
    while band is not None:
        above, inside = ranks.totals([sum(band.above), band.inside.held])
        if above < k <= above + inside:
            passed = _plus(passed, band.above)
            scores, k, total = band.inside, k - above, inside
        else:
            # The value is one end of the band and tied many times over, or the band missed it.
            end = band.high if k <= above else band.low
            more, equal = scores.compare(end)
            above, ties = ranks.totals([sum(more), sum(equal)])
            if above < k <= above + ties:
                return end, _plus(passed, more), equal
            if k <= above:
                _, scores = scores.select(scores.next(end, math.inf), math.inf)
                total = above
            else:
                passed = _plus(_plus(passed, more), equal)
                _, scores = scores.select(-math.inf, scores.next(end, -math.inf))
                k, total = k - above - ties, total - above - ties
        band = narrow(scores, k, total)
    values = ranks.gather(torch.cat([c for p in scores.pieces for c in scores.chunks(p)]))
    value = _largest(values, k)
    more, equal = scores.compare(value)
    return value, _plus(passed, more), equal


def _plus(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _bracket(scores: Parts, k: int, total: int) -> tuple[float, float]:
    """Two scores, or infinities, that enclose the ``k``-th largest with high probability."""
    stride = total // sample_size(total)
    parts: list[Tensor] = []
    seen = 0
    for piece in scores.pieces:
        parts.extend(scores.chunks(piece[-seen % stride :: stride]))
        seen += piece.numel()
    sample = scores.ranks.gather(torch.cat(parts))
    n = sample.numel()
    share = k / total
    # Six standard deviations of the sample rank, plus slack for very small ranks.
    margin = 6 * math.sqrt(max(n * share * (1 - share), 1.0)) + 6
    first, last = math.floor(n * share - margin), math.ceil(n * share + margin)
    high = _largest(sample, first) if first >= 1 else math.inf
    low = _largest(sample, last) if last <= n else -math.inf
    return low, high


def _largest(values: Tensor, k: int) -> float:
    """The ``k``-th largest of a few values."""
    return float(values.kthvalue(values.numel() - k + 1).values)
