"""Optimal clustering of numbers: the k values that stand best for very many.

In one dimension the clusters of least squared error are runs of the sorted values, so that dynamic
programming finds the global optimum (Wang & Song, "Ckmeans.1d.dp: optimal k-means clustering in
one dimension by dynamic programming", The R Journal 2011). The further right the last run of the
best partition ends, the further right it starts; so each of the ``k`` steps is divided and
conquered in ``O(n log n)`` (Grønlund et al., "Fast exact k-means, k-medians and Bregman divergence
clustering in 1D", 2017). With too many values for that, the program runs on bins of them. Lloyd's
iteration ("Least squares quantization in PCM", 1982) on the values themselves then moves the cuts
to where they belong within a bin; after an exact optimum it stops at once.

Sorting first costs less than the passes it saves: ties, bins, extremes and the clusters of given
centroids are found by bisection, and neither order, type nor device of the values matters.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_condensa.functional.chunks import chunk_length

#: Bins in place of very many values, and how many at least for each cluster.
_BINS, _BINS_EACH = 4096, 16

#: Lloyd's iterations: they start within a bin of the optimum.
_ITERATIONS = 8

_Floats = NDArray[np.float64]
_Singles = NDArray[np.float32]
_Ints = NDArray[np.intp]


def kmeans_1d(values: Tensor, k: int, *, exact_below: int = 4096) -> Tensor:
    """The centroids of least squared error: ``Σ min_c (value - c)²`` over all values.

    Args:
        values: Numbers of any shape, on any device; they are rounded to float32 first.
        k: Number of centroids, at least 1.
        exact_below: Up to how many distinct values the result is the global optimum, rounded to
            float32, in time ``O(k n log n)`` and memory ``O(n (k + log n))``. Of more, bins of
            neighbours are clustered: a local optimum next to the global one.

    Returns:
        float32 ``(min(k, distinct values),)``, ascending, on the device of ``values``. At most
        ``k`` distinct values are returned as they are (``-0.0`` as ``0.0``).

    Raises:
        ValueError: If ``k`` is below 1, or a value is not finite in float32.

    Example:
        >>> kmeans_1d(torch.tensor([[0.0, 1.0, 10.0], [12.0, -1.0, 11.0]]), 2)
        tensor([ 0., 11.])
    """
    if k < 1:
        raise ValueError(f"k is {k}: it must be at least 1, the number of centroids")
    ordered = _sorted(values)
    if not len(ordered):
        return torch.empty(0, dtype=torch.float32, device=values.device)
    low, high = float(ordered[0]), float(ordered[-1])
    if not np.isfinite([low, high]).all():  # NaN is sorted last
        raise ValueError(f"values range from {low} to {high}: they must be finite in float32")
    changes = ordered[1:] != ordered[:-1]
    distinct = 1 + int(np.count_nonzero(changes))
    if distinct <= max(k, exact_below):
        edges = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(ordered)]])
    else:
        edges = _bins(ordered, max(_BINS, _BINS_EACH * k))
    centroids = _means(ordered, edges)
    if distinct > k:
        # Spread within a bin counts against every partition into bins alike: the means suffice.
        starts = _partition(centroids, np.diff(edges), k)
        centroids = _lloyd(ordered, np.append(edges[starts], len(ordered)))
    single = centroids.astype(np.float32) + np.float32(0)  # -0.0 becomes 0.0
    return torch.from_numpy(single).to(values.device)


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid of each value, the lower one of two as near.

    Args:
        values: Numbers of any shape.
        centroids: ``(k,)``, ascending, on any device; they are rounded to float32.

    Returns:
        Indices in the shape and on the device of ``values``: uint8 for up to 256 centroids, int16
        for up to 2¹⁵, else int32.

    Raises:
        ValueError: If the centroids are not one ascending row of at least one number.

    Example:
        >>> nearest(torch.tensor([[-3.0, 0.4], [0.5, 7.0]]), torch.tensor([0.0, 1.0]))
        tensor([[0, 0],
                [0, 1]], dtype=torch.uint8)
    """
    table = centroids.detach().to("cpu", torch.float32).numpy()
    if table.ndim != 1 or not len(table) or not (table[:-1] <= table[1:]).all():
        given = f"centroids of shape {table.shape}"
        raise ValueError(f"{given}: they must be one row of at least one number, ascending")
    return cells(values, middles(torch.from_numpy(table)))


def middles(centroids: Tensor) -> Tensor:
    """Where the nearest of ascending centroids changes, in double precision.

    Example:
        >>> middles(torch.tensor([0.0, 1.0, 4.0]))
        tensor([0.5000, 2.5000], dtype=torch.float64)
    """
    wide = centroids.detach().to("cpu", torch.float64)
    return (wide[:-1] + wide[1:]) / 2


def cells(values: Tensor, borders: Tensor) -> Tensor:
    """How many borders lie below each value.

    Args:
        values: Numbers of any shape.
        borders: Ascending, in double precision, on any device.

    Returns:
        Indices in the shape and on the device of ``values``: uint8 for up to 255 borders, int16
        for fewer than 2¹⁵, else int32.

    Example:
        >>> cells(torch.tensor([-3.0, 0.5, 7.0]), torch.tensor([0.5, 2.5], dtype=torch.float64))
        tensor([0, 0, 2], dtype=torch.uint8)
    """
    k = len(borders) + 1
    dtype = torch.uint8 if k <= 256 else torch.int16 if k <= 2**15 else torch.int32
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    bounds = borders.detach().cpu()
    if wide == torch.float32:
        bounds = torch.from_numpy(_rounded_down(bounds.numpy()))
    bounds = bounds.to(values.device)
    flat = values.detach().reshape(-1)
    index = torch.empty(flat.shape, dtype=dtype, device=values.device)
    length = chunk_length(flat)
    for piece, out in zip(torch.split(flat, length), torch.split(index, length), strict=True):
        out.copy_(torch.bucketize(piece.to(wide), bounds, out_int32=True))
    return index.view(values.shape)


def cell_means(values: Tensor, borders: Tensor) -> Tensor:
    """The mean of the values in each cell: the centroids of least error that keep them apart.

    Args:
        values: Finite numbers of any shape, on any device; they are rounded to float32 first.
        borders: Ascending, in double precision.

    Returns:
        float32 ``(len(borders) + 1,)``, ascending, on the device of ``values``; for a cell without
        values the middle of its borders, or its only one.

    Example:
        >>> cell_means(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([4.0, 9.0]).double())
        tensor([2., 8., 9.])
    """
    ordered, cuts = _sorted(values), borders.detach().cpu().numpy()
    inner = np.searchsorted(ordered, _rounded_down(cuts), side="right")
    means = _means(ordered, np.concatenate([[0], inner, [len(ordered)]]))
    empty = np.isnan(means)
    if empty.any() and len(cuts) > 0:
        means[empty] = (np.append(cuts[0], cuts) + np.append(cuts, cuts[-1]))[empty] / 2
    single = np.nan_to_num(means).astype(np.float32) + np.float32(0)  # -0.0 becomes 0.0
    return torch.from_numpy(single).to(values.device)


def _sorted(values: Tensor) -> _Singles:
    flat = values.detach().reshape(-1).to(torch.float32)
    if flat.device.type == "cpu":
        return np.sort(flat.numpy())  # several times as fast as torch's, which sorts indices, too
    ordered: _Singles = flat.sort().values.cpu().numpy()
    return ordered


def _middle(low: NDArray[Any], high: NDArray[Any]) -> _Floats:
    middle: _Floats = (low.astype(np.float64) + high.astype(np.float64)) / 2
    return middle


def _rounded_down(middle: _Floats) -> _Singles:
    """Largest float32 not above: a float32 is at most the one if it is at most the other."""
    single = middle.astype(np.float32)
    return np.where(single > middle, np.nextafter(single, np.float32(-np.inf)), single)


def _bins(ordered: _Singles, count: int) -> _Ints:
    """First positions, and the end, of about ``count`` runs of sorted values that differ little.

    The bins that spread most are halved, again and again: that finds tails of any weight, while a
    single outlier costs a few bins only. Equal values are never parted.
    """
    edges = np.array([0, len(ordered)])
    while True:
        low, high = ordered[edges[:-1]], ordered[edges[1:] - 1]
        spread = np.diff(edges) * np.subtract(high, low, dtype=np.float64) ** 2
        room = count - len(spread)
        if room <= 0 or not spread.any():
            return edges
        # Halving divides the spread of an evenly filled bin by 8: none is cut before its turn.
        worst = np.flatnonzero((spread > 0) & (spread >= spread.max() / 8))[:room]
        borders = _rounded_down(_middle(low[worst], high[worst]))
        edges = np.sort(np.append(edges, np.searchsorted(ordered, borders, side="right")))


def _means(ordered: _Singles, edges: _Ints) -> _Floats:
    """Mean of each run of the sorted values; NaN for one that is empty."""
    sums = np.array([ordered[a:b].sum(dtype=np.float64) for a, b in pairwise(edges)])
    counts = np.diff(edges)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _lloyd(ordered: _Singles, edges: _Ints) -> _Floats:
    """Centroids that Lloyd's iteration reaches from a partition of the sorted values."""
    centroids = _means(ordered, edges)
    for _ in range(_ITERATIONS):
        borders = _rounded_down(_middle(centroids[:-1], centroids[1:]))
        moved = edges.copy()
        moved[1:-1] = np.searchsorted(ordered, borders, side="right")
        if np.array_equal(moved, edges):
            break
        edges, means = moved, _means(ordered, moved)
        centroids = np.where(np.isnan(means), centroids, means)
    return centroids


def _partition(points: _Floats, weights: NDArray[Any], k: int) -> _Ints:
    """First positions of the ``k`` runs of ``k`` or more ascending points with least error."""
    cost = _cost(points, weights)
    every = np.arange(len(points))
    best = cost(np.zeros_like(every), every)  # up to each point, of one run
    layers = []
    for run in range(1, k):
        best, starts = _add_run(best, cost, run)
        layers.append(starts)
    cuts = [len(points)]
    for starts in reversed(layers):
        cuts.append(int(starts[cuts[-1] - 1]))
    return np.array([0, *cuts[:0:-1]], dtype=np.intp)


def _add_run(
    best: _Floats, cost: Callable[[_Ints, _Ints], _Floats], run: int
) -> tuple[_Floats, _Ints]:
    """Least error up to each point with one run more, and where the last run then starts.

    Every second point, then every second of those left, and so on: between two points whose start
    is known, only starts between theirs are tried. All tries of a level are one vector.
    """
    n = len(best)
    count = n - run  # all runs before it being non-empty, it ends at point `run` or later
    size = 1 << count.bit_length()
    known = np.full(size + 1, n - 1)  # known[i + 1] is the start for the end `run + i`
    known[0] = run
    error, origin = np.full(n, np.inf), np.zeros(n, dtype=np.intp)
    stride = size // 2
    while stride:
        at = np.arange(stride, count + 1, 2 * stride)
        ends = at + (run - 1)
        first, last = known[at - stride], np.minimum(known[at + stride], ends)
        lengths = last - first + 1
        offsets = np.cumsum(lengths) - lengths
        starts = np.arange(lengths.sum()) + np.repeat(first - offsets, lengths)
        errors = best[starts - 1] + cost(starts, np.repeat(ends, lengths))
        error[ends] = np.minimum.reduceat(errors, offsets)
        hits = np.flatnonzero(errors == np.repeat(error[ends], lengths))
        known[at] = origin[ends] = starts[hits[np.searchsorted(hits, offsets)]]  # leftmost hits
        stride //= 2
    return error, origin


def _cost(points: _Floats, weights: NDArray[Any]) -> Callable[[_Ints, _Ints], _Floats]:
    """Squared error of runs of points, given first and last positions.

    Differences of running sums would lose what is small beside the sums. Here moments are about a
    point within the run: for each power of two, from the middle of blocks of this length outwards,
    and a run takes those of the one block whose middle it spans (a disjoint sparse table).
    """
    levels = (len(points) - 1).bit_length()
    padding = (0, (1 << levels) - len(points))
    x, w = np.pad(points, padding, mode="edge"), np.pad(weights.astype(np.float64), padding)
    tables = np.zeros((2, levels + 1, len(x)))  # at level 0 runs of one point, which have no error
    for level in range(1, levels + 1):
        half = 1 << (level - 1)
        blocks = x.reshape(-1, 2 * half)
        moment = w.reshape(blocks.shape)
        for table in tables:
            moment = moment * (blocks - blocks[:, half : half + 1])
            sums = table[level].reshape(blocks.shape)
            sums[:, half:] = moment[:, half:].cumsum(1)
            sums[:, :half] = moment[:, :half][:, ::-1].cumsum(1)[:, ::-1]
    first, second = tables.reshape(2, -1)
    mass = np.concatenate([[0.0], w.cumsum()])
    bits = np.frexp(np.arange(len(x)))[1].astype(np.intp)

    def cost(starts: _Ints, ends: _Ints) -> _Floats:
        row = bits[starts ^ ends] * len(x)
        left, right = row + starts, row + ends
        total = first[left] + first[right]
        squares = second[left] + second[right] - total * total / (mass[ends + 1] - mass[starts])
        result: _Floats = np.maximum(squares, 0.0)
        return result

    return cost
