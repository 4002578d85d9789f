"""Stream codecs of the packed file: positions as gaps, words as byte planes, compression.

Each codec is a pair of pure functions over unsigned numpy arrays.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.words import Words, word_type

try:
    import zstandard
except ImportError:  # an extra: files are then written with zlib
    zstandard = None  # type: ignore[assignment]

CODECS = ("raw", "zlib", "zstd")
"""How a chunk may be stored."""

_CONTINUE = 255
_ZSTD_LEVEL = 19
_ZLIB_LEVEL = 9
_FAST_LEVEL = 1
# The best levels manage 2 MB a second. Longer chunks are planes of nearly dense tensors, whose
# bytes hold nothing that a long search would find: a fast level, or none where that saves nothing.
_LONG_CHUNK = 4 << 20
_LONG_LEVEL = 3
_WORTHWHILE = 0.995
# What another segment takes in the spec, about.
_SEGMENT_BYTES = 16


@dataclass(frozen=True)
class Chunk:
    """Bytes as they stand in the file.

    Attributes:
        codec: One of `CODECS`.
        data: The stored bytes.
    """

    codec: str
    data: bytes | memoryview


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


def decode_gaps(stream: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The inverse of `encode_gaps`.

    Args:
        stream: ``(m,)`` bytes.

    Returns:
        ``(n,)`` strictly increasing indices, n the number of bytes below 255.

    Raises:
        PackedFileError: If the stream ends in the middle of a gap.

    Example:
        >>> decode_gaps(np.array([0, 0, 3, 255, 39], np.uint8)).tolist()
        [0, 1, 5, 300]
    """
    if len(stream) and stream[-1] == _CONTINUE:
        raise PackedFileError("the gaps end in the middle of a gap")
    ends = np.flatnonzero(stream != _CONTINUE)
    indices = np.cumsum(stream, dtype=np.int64)[ends]
    indices += np.arange(len(indices))
    return indices


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
        ``(n,)`` words in new memory.

    Example:
        >>> join_planes([np.array([2, 4], np.uint8), np.array([1, 3], np.uint8)]).tolist()
        [258, 772]
    """
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


def compress(data: NDArray[np.uint8] | bytes) -> Chunk:
    """The smaller of the bytes as they are and compressed: zstd-19, or zlib-9 without zstandard.

    Chunks above 4 MiB get a fast level.

    Args:
        data: What to store.

    Returns:
        The chunk; ``raw`` on a tie.

    Example:
        >>> compress(b"no").codec, len(compress(bytes(1000)).data) < 30
        ('raw', True)
    """
    plain = bytes(data)
    best = _deflate(plain, fast=len(plain) > _LONG_CHUNK)
    limit = len(plain) * (_WORTHWHILE if len(plain) > _LONG_CHUNK else 1)
    return best if len(best.data) < limit else Chunk("raw", plain)


def _deflate(plain: bytes, fast: bool) -> Chunk:
    if zstandard is not None:
        level = _LONG_LEVEL if fast else _ZSTD_LEVEL
        return Chunk("zstd", zstandard.ZstdCompressor(level=level).compress(plain))
    return Chunk("zlib", zlib.compress(plain, _LONG_LEVEL if fast else _ZLIB_LEVEL))


def estimate_size(planes: Sequence[NDArray[np.uint8]]) -> int:
    """About how many bytes `compress` would store, from a fast pass over each plane.

    Args:
        planes: What would be stored, one chunk each.

    Returns:
        Bytes.

    Example:
        >>> estimate_size([np.zeros(1000, np.uint8)]) < 30
        True
    """
    size = 0
    for plane in planes:
        if zstandard is not None:
            small = zstandard.ZstdCompressor(level=_FAST_LEVEL).compress(plane.data)
        else:
            small = zlib.compress(plane.data, _FAST_LEVEL)
        size += min(len(plane), len(small))
    return size


def decompress(chunk: Chunk, size: int) -> NDArray[np.uint8]:
    """The bytes of a chunk, never more than ``size`` of them.

    Args:
        chunk: From a file, possibly hostile.
        size: Bytes that the file declares.

    Returns:
        ``(size,)`` bytes, read-only.

    Raises:
        PackedFileError: If the chunk does not hold exactly ``size`` bytes.
        ImportError: If the chunk is zstd and zstandard is not installed.

    Example:
        >>> decompress(compress(bytes(1000)), 1000).any()
        np.False_
    """
    if chunk.codec == "zstd":
        plain: bytes | memoryview = _unzstd(chunk.data, size)
    elif chunk.codec == "zlib":
        plain = inflate(chunk.data, limit=size)
    elif chunk.codec == "raw":
        plain = chunk.data
    else:
        raise PackedFileError(f"unknown codec {chunk.codec!r}, known are {', '.join(CODECS)}")
    if len(plain) != size:
        raise PackedFileError(f"a {chunk.codec} chunk holds {len(plain)} bytes, {size} declared")
    return np.frombuffer(plain, dtype=np.uint8)


def inflate(data: bytes | memoryview, limit: int) -> bytes:
    """Decompress one whole zlib stream of at most ``limit`` bytes.

    Raises:
        PackedFileError: If it is corrupt, cut, followed by other bytes, or holds more.

    Example:
        >>> inflate(zlib.compress(b"abc"), limit=3)
        b'abc'
    """
    stream = zlib.decompressobj()
    try:
        # One byte beyond the limit tells "more"; a bound of 0 would mean none.
        plain = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise PackedFileError(f"a zlib chunk is corrupt: {error}") from None
    if len(plain) > limit:
        raise PackedFileError(f"a zlib chunk holds more than the {limit} bytes allowed")
    if not stream.eof or stream.unused_data:
        raise PackedFileError("a zlib chunk is cut or followed by other bytes")
    return plain


def _unzstd(data: bytes | memoryview, size: int) -> bytes:
    if zstandard is None:
        raise ImportError(
            "this packed file is compressed with zstd: pip install lightning-condensa[zstd]"
        )
    try:
        declared = zstandard.frame_content_size(data)
        if declared != size:
            raise PackedFileError(f"a zstd chunk holds {declared} bytes, {size} declared")
        plain: bytes = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise PackedFileError(f"a zstd chunk is corrupt: {error}") from None
    return plain
