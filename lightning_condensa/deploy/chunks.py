"""Chunks of the packed file: bytes as they are, or compressed.

Each codec is a pair of pure functions over bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_condensa.deploy.errors import PackedFileError

try:
    import zstandard
except ImportError:  # an extra: files are then written with zlib
    zstandard = None  # type: ignore[assignment]

CODECS = ("raw", "zlib", "zstd")
"""How a chunk may be stored."""

_ZSTD_LEVEL = 19
_ZLIB_LEVEL = 9
_FAST_ZLIB_LEVEL = 1
# The best levels manage 2 MB a second. Longer chunks are planes of nearly dense tensors, whose
# bytes hold nothing that a long search would find: a fast one, or none where that saves nothing.
_LONG_CHUNK = 4 << 20
_WORTHWHILE = 0.995


@dataclass(frozen=True)
class Chunk:
    """Bytes as they stand in the file.

    Attributes:
        codec: One of `CODECS`.
        data: The stored bytes.
    """

    codec: str
    data: bytes | memoryview


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


def _deflate(plain: bytes | memoryview, fast: bool) -> Chunk:
    if zstandard is not None:
        compressor = _fast_zstd() if fast else zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        return Chunk("zstd", compressor.compress(plain))
    return Chunk("zlib", zlib.compress(plain, _FAST_ZLIB_LEVEL if fast else _ZLIB_LEVEL))


def _fast_zstd() -> zstandard.ZstdCompressor:
    """Entropy coding with next to no search for matches.

    Codes are random: short matches that a fast level finds by chance cost more bytes than they
    save, and twice the time to read.
    """
    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        min_match=7,
        hash_log=6,
        write_content_size=True,
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


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
    return sum(min(len(plane), len(_deflate(plane.data, fast=True).data)) for plane in planes)


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
