"""Exact global top-k over many tensors, without copying them into one.

``torch.topk`` on the concatenation of all scores sorts a partial heap of k elements and needs a
second copy of the network. Here the k-th largest value is bracketed from a small strided sample
(Floyd & Rivest, "Expected time bounds for selection", CACM 1975), the elements above the bracket
are counted in one pass, and only the few inside it are selected from. The answer is exact for every
input: a bracket that misses is widened to everything on the side that was missed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

_SAMPLE = 1 << 16
_CHUNK = 1 << 16  # elements that, with their masks, stay in the cache


def topk_masks(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks of the ``k`` largest scores over all tensors together.

    Exactly ``k`` elements are kept: of the scores equal to the threshold, the first ones in order
    (tensor by tensor, row-major) survive.

    Args:
        scores: Floating point tensors of any shapes, without NaN.
        k: How many elements to keep, ``0 <= k <= sum of numel``.

    Returns:
        One boolean tensor per score tensor, of its shape.

    Raises:
        ValueError: If ``k`` is out of range.

    Example:
        >>> topk_masks([torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])], 2)
        [tensor([False,  True]), tensor([ True, False])]
    """
    total = sum(s.numel() for s in scores)
    if not 0 <= k <= total:
        raise ValueError(f"k must lie in [0, {total}], got {k}")
    if k == 0:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    if k == total:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    dtype = _common_dtype(scores)
    threshold = kth_largest(scores, k)
    masks = []
    ties = threshold.ties
    for score in scores:
        score = score.to(dtype)
        if threshold.ties == threshold.equal:  # the usual case: no tie to cut
            masks.append(score >= threshold.value)
            continue
        mask = score > threshold.value
        tied = (score == threshold.value).flatten().nonzero().squeeze(1)[:ties]
        mask.view(-1)[tied] = True
        ties -= tied.numel()
        masks.append(mask)
    return masks


class Threshold(NamedTuple):
    """Where a top-k ends.

    Attributes:
        value: The k-th largest score.
        ties: How many of the scores equal to ``value`` belong to the top k, at least 1.
        equal: How many scores equal ``value``.
    """

    value: float
    ties: int
    equal: int


def kth_largest(scores: Sequence[Tensor], k: int) -> Threshold:
    """The ``k``-th largest of all scores, and how many equal to it belong to the top ``k``.

    Args:
        scores: Floating point tensors, without NaN.
        k: Rank, ``1 <= k <= sum of numel``.

    Example:
        >>> kth_largest([torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])], 2)
        Threshold(value=2.0, ties=1, equal=2)
    """
    dtype = _common_dtype(scores)
    flat = [s.reshape(-1).to(dtype) for s in scores if s.numel() > 0]
    low, high = _bracket(flat, k)
    above, inside = _scan(flat, low, high)
    if above >= k:  # the k-th largest lies above the bracket
        above, inside = _scan(flat, high, math.inf)
    elif above + inside.numel() < k:  # it lies below
        above, inside = _scan(flat, -math.inf, low)
    value = inside.kthvalue(inside.numel() - (k - above) + 1).values
    ties = k - above - int(torch.count_nonzero(inside > value))
    return Threshold(float(value), ties, int(torch.count_nonzero(inside == value)))


def _common_dtype(scores: Sequence[Tensor]) -> torch.dtype:
    """A type that holds every score exactly: a threshold is never rounded to a narrower one."""
    return reduce(torch.promote_types, {s.dtype for s in scores})


def _bracket(flat: Sequence[Tensor], k: int) -> tuple[float, float]:
    """Values that enclose the k-th largest with high probability, from a strided sample."""
    total = sum(f.numel() for f in flat)
    stride = max(1, total // _SAMPLE)
    if stride == 1:
        return -math.inf, math.inf
    sample = torch.cat([f[::stride].to(torch.float32) for f in flat])
    ordered = sample.sort(descending=True).values
    n = ordered.numel()
    expected = k / total * n
    # Six standard deviations of the sample rank, plus slack for very small ranks.
    margin = 6 * math.sqrt(max(expected * (1 - k / total), 1.0)) + 6
    first, last = int(expected - margin), math.ceil(expected + margin)
    high = float(ordered[first]) if first >= 0 else math.inf
    low = float(ordered[last]) if last < n else -math.inf
    return low, high


def _scan(flat: Sequence[Tensor], low: float, high: float) -> tuple[int, Tensor]:
    """How many elements exceed ``high``, and all elements in ``[low, high]``."""
    above = 0
    inside = []
    for chunk in chain.from_iterable(torch.split(f, _CHUNK) for f in flat):
        above += int(torch.count_nonzero(chunk > high))
        inside.append(chunk[(chunk >= low) & (chunk <= high)])
    return above, torch.cat(inside)
