"""Streams of the packed file: positions as gaps, words as byte planes.

Each codec is a pair of pure functions over unsigned numpy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_condensa.deploy.chunks import estimate_size
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.words import Words, word_type

BLOCK = 1 << 15
"""Elements that are decoded at a time."""

_CONTINUE = 255
# What another segment takes in the spec, about.
_SEGMENT_BYTES = 16


def encode_gaps(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Positions as distances, one byte each where they are short.

    The gap ``idx[i] - idx[i-1] - 1`` (with ``idx[-1] = -1``) is written as ``gap // 255`` bytes
    of 255, each meaning "+255, continue", and one byte ``gap % 255``.

    Args:
        indices: ``(n,)`` strictly increasing, non-negative.

    Returns:
        ``(m,)`` bytes, ``n <= m <= n + (idx[-1] + 1) / 255``.

    Example:
        >>> encode_gaps(np.array([0, 1, 5, 300])).tolist()
        [0, 0, 3, 255, 39]
    """
    gaps = np.diff(indices, prepend=-1) - 1
    ends = np.cumsum(gaps // _CONTINUE + 1)
    stream = np.full(ends[-1] if len(ends) else 0, _CONTINUE, dtype=np.uint8)
    stream[ends - 1] = gaps % _CONTINUE
    return stream


def check_gaps(stream: NDArray[np.uint8], count: int, size: int) -> None:
    """Check that gaps lead to ``count`` positions, all below ``size``, before they are decoded.

    Raises:
        PackedFileError: If they do not.

    Example:
        >>> check_gaps(np.array([0, 0, 3, 255, 39], np.uint8), count=4, size=301)
    """
    if len(stream) and stream[-1] == _CONTINUE:
        raise PackedFileError("its gaps end in the middle of a gap")
    if (found := int(np.count_nonzero(stream != _CONTINUE))) != count:
        raise PackedFileError(f"it has {found} positions, not {count}")
    if int(stream.sum(dtype=np.int64)) + count > size:
        raise PackedFileError(f"it has positions beyond its {size} elements")


def positions(stream: NDArray[np.uint8]) -> Iterator[NDArray[np.int64]]:
    """The inverse of `encode_gaps`, block by block, so that work stays in the processor's cache.

    Args:
        stream: ``(m,)`` bytes that do not end in the middle of a gap.

    Yields:
        Strictly increasing indices, in all as many as there are bytes below 255.

    Example:
        >>> [block.tolist() for block in positions(np.array([0, 0, 3, 255, 39], np.uint8))]
        [[0, 1, 5, 300]]
    """
    last = -1
    for begin in range(0, len(stream), BLOCK):
        part = stream[begin : begin + BLOCK]
        ends = part != _CONTINUE
        indices = np.add(part, ends, dtype=np.int64)
        indices[0] += last
        np.cumsum(indices, out=indices)
        last = int(indices[-1])
        yield indices if ends.all() else indices[ends]


def split_planes(words: Words) -> list[NDArray[np.uint8]]:
    """Words as byte planes, the least significant first: exponents compress, mantissas do not.

    Args:
        words: ``(n,)`` unsigned words of w bytes.

    Returns:
        w contiguous planes of shape ``(n,)``.

    Example:
        >>> [plane.tolist() for plane in split_planes(np.array([0x0102, 0x0304], np.uint16))]
        [[2, 4], [1, 3]]
    """
    width = words.dtype.itemsize
    little = words.astype(words.dtype.newbyteorder("<"), copy=False)
    return list(np.ascontiguousarray(little.view(np.uint8).reshape(-1, width).T))


def join_planes(planes: Sequence[NDArray[np.uint8]]) -> Words:
    """The inverse of `split_planes`.

    Args:
        planes: 1, 2, 4 or 8 planes of shape ``(n,)``.

    Returns:
        ``(n,)`` words; a single plane is its own word.

    Example:
        >>> join_planes([np.array([2, 4], np.uint8), np.array([1, 3], np.uint8)]).tolist()
        [258, 772]
    """
    if len(planes) == 1:
        return planes[0]
    native = word_type(8 * len(planes))
    little = np.stack(planes, axis=1).view(native.newbyteorder("<")).reshape(-1)
    words: Words = little.astype(native, copy=False)
    return words


def joined(parts: Sequence[Words]) -> list[Words]:
    """What tensors add to a stream, as few segments that are better compressed by themselves.

    Neighbours whose words are alike share a segment and so its code; others would spoil it.

    Args:
        parts: Words of each tensor, equally wide; at least one word in all.

    Returns:
        The same words in the same order.

    Example:
        >>> few, many = np.zeros(10, np.uint8), np.arange(200, dtype=np.uint8)
        >>> [len(segment) for segment in joined([few, few, many])]
        [220]
    """
    segments: list[list[Words]] = []
    last: Words = np.empty(0, np.uint8)  # of those that are worth a look
    for part in (p for p in parts if len(p)):
        small = part.nbytes <= _SEGMENT_BYTES
        if segments and (small or len(last) == 0 or _alike(last, part)):
            segments[-1].append(part)
        else:
            segments.append([part])
        last = last if small else part
    return [np.concatenate(segment) for segment in segments]


def _alike(first: Words, second: Words) -> bool:
    """Whether two parts take no more bytes together than apart."""
    apart = sum(estimate_size(split_planes(part)) for part in (first, second))
    together = estimate_size(split_planes(np.concatenate([first, second])))
    return together <= apart + _SEGMENT_BYTES
