"""Exact global top-k over many tensors, without copying them into one.

Scores may be DTensors, mixed with plain tensors that every process holds alike. The masks are then
DTensors placed like them, and put together they are, bit for bit, those of the whole tensors on one
process. No weights are gathered: each process reads its own shards, and what is communicated are
counts, samples that grow as N^⅔ (85,000 of 25 million scores), and in the end at most 16,384
candidates near the threshold. Each process must make the same calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_condensa.functional.masks import greater
from lightning_condensa.functional.placement import like, linear_indices, local
from lightning_condensa.functional.threshold import Band, Parts, kth, narrow


@torch.no_grad()
def topk_masks(
    scores: Sequence[Tensor],
    k: int,
    floors: Sequence[int] | None = None,
    *,
    absolute: bool = False,
) -> list[Tensor]:
    """Masks of the ``k`` largest scores over all tensors together.

    Exactly ``k`` elements are kept: of the scores equal to the threshold, the first ones in order
    (tensor by tensor, row-major) survive. A tensor that would keep fewer than its floor keeps
    exactly its floor, and the others share what is left.

    Args:
        scores: Floating point tensors of any shapes, without NaN; plain ones or DTensors.
        k: How many elements to keep, ``0 <= k <= sum of numel``.
        floors: How many elements survive in each tensor at least; none if not given.
        absolute: Compare magnitudes, which takes no copy of the scores.

    Returns:
        One boolean tensor per score tensor, of its shape and placement.

    Raises:
        ValueError: If ``k`` or a floor is out of range, or if tensors are placed in a way that
            cannot be counted (pending sums, unrelated meshes).

    Example:
        >>> topk_masks([torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])], 2)
        [tensor([False,  True]), tensor([ True, False])]
        >>> topk_masks([torch.tensor([1.0, 3.0]), torch.tensor([4.0, 5.0])], 2, floors=[1, 1])
        [tensor([False,  True]), tensor([False,  True])]
    """
    sizes = [s.numel() for s in scores]
    if not 0 <= k <= sum(sizes):
        raise ValueError(f"k must lie in [0, {sum(sizes)}], got {k}")
    least = list(floors or [0] * len(sizes))
    if any(not 0 <= f <= n for f, n in zip(least, sizes, strict=True)) or sum(least) > k:
        raise ValueError(f"floors must fit tensors of {sizes} elements and k={k}, got {least}")
    parts = Parts.of(scores, absolute)
    cuts = _cuts(parts, sizes, k, least)
    return [_mask(parts, score, cut) for score, cut in zip(scores, cuts, strict=True)]


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


@torch.no_grad()
def kth_largest(scores: Sequence[Tensor], k: int) -> Threshold:
    """The ``k``-th largest of all scores, and how many equal to it belong to the top ``k``.

    Args:
        scores: Floating point tensors, without NaN; plain ones or DTensors.
        k: Rank, ``1 <= k <= sum of numel``.

    Example:
        >>> kth_largest([torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])], 2)
        Threshold(value=2.0, ties=1, equal=2)
    """
    parts = Parts.of(scores, absolute=False)
    value, above, equal = kth(parts, k, sum(s.numel() for s in scores))
    more, ties = parts.ranks.totals([sum(above), sum(equal)])
    return Threshold(value, k - more, ties)


class _Cut(NamedTuple):
    """What one tensor keeps: the scores above a value, and the first ``ties`` equal to it."""

    value: float
    above: int
    ties: int
    equal: int


def _cuts(parts: Parts, sizes: Sequence[int], k: int, floors: Sequence[int]) -> list[_Cut]:
    cuts: dict[int, _Cut] = {}
    band = narrow(parts, k, sum(sizes))
    free = list(range(len(sizes)))
    while True:
        near = None if band is None else band.only(free)
        shares = _shares(parts.only(free), [sizes[i] for i in free], k, near)
        cuts.update(zip(free, shares, strict=True))
        poor = [i for i in free if cuts[i].above + cuts[i].ties < floors[i]]
        if not poor:
            return [cuts[i] for i in range(len(sizes))]
        # A tensor below its floor keeps exactly its floor; the others share what is left, which can
        # push another one below. Their new threshold is near the old one, in the same band.
        for i in poor:
            cuts[i] = _shares(parts.only([i]), [sizes[i]], floors[i])[0]
            k -= floors[i]
        free = [i for i in free if i not in poor]


def _shares(parts: Parts, sizes: Sequence[int], k: int, band: Band | None = None) -> list[_Cut]:
    """What each tensor keeps of the ``k`` largest of all."""
    if k == 0:
        return [_Cut(math.inf, 0, 0, 0) for _ in sizes]
    if k == sum(sizes):
        return [_Cut(-math.inf, 0, n, n) for n in sizes]
    value, *counts = kth(parts, k, sum(sizes), band)
    totals = parts.ranks.totals([*counts[0], *counts[1]])
    above, equal = totals[: len(sizes)], totals[len(sizes) :]
    left = k - sum(above)
    cuts = []
    for more, ties in zip(above, equal, strict=True):
        cuts.append(_Cut(value, more, min(ties, left), ties))
        left -= cuts[-1].ties
    return cuts


def _mask(parts: Parts, score: Tensor, cut: _Cut) -> Tensor:
    """The mask of one tensor; of ties that are cut the first in order are kept."""
    part = local(score)
    flat = part.detach().reshape(-1)
    mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    every = 0 < cut.ties == cut.equal
    ties = 0 if every else _first(parts, score, flat, cut)
    start = 0
    for chunk in parts.chunks(flat):
        kept = mask[start : start + chunk.numel()]
        start += chunk.numel()
        greater(chunk, cut.value, kept, or_equal=every)
        if ties > 0:
            tied = (chunk == cut.value).nonzero().squeeze(1)[:ties]
            kept[tied] = True
            ties -= tied.numel()
    return like(mask.view(part.shape), score)


def _first(parts: Parts, score: Tensor, flat: Tensor, cut: _Cut) -> int:
    """How many of this process's ties are among the first ``cut.ties`` in the whole tensor."""
    if cut.ties == 0 or not isinstance(score, DTensor):
        return cut.ties
    # Shards keep the order of their elements, so that the first ones here are a prefix too.
    where = torch.cat([c == cut.value for c in parts.chunks(flat)]).nonzero().squeeze(1)
    order = linear_indices(score, where).neg().double()
    mine = Parts((order if parts.ranks.own(score) else order[:0],), order.dtype, False, parts.ranks)
    return int((order >= kth(mine, cut.ties, cut.equal)[0]).count_nonzero())
