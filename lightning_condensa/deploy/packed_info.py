"""What is in a packed file, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_condensa.deploy.spec import (
    Entry,
    RestEntry,
    Spec,
    StoredStream,
    stream_counts,
    stream_width,
    type_bits,
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a packed file.

    Attributes:
        name: Its key in a state dict.
        shape: Its shape.
        storage: ``sparse`` or ``dense`` (compressed by a scheme), ``product`` or ``sum`` of such
            tensors, or ``rest``.
        value_type: Type of what is stored, as safetensors names it; types, where parts differ.
        bits: Bits of one stored value.
        nnz: Values whose bit pattern is not zero; ``None`` for the rest, where it is not known.
        raw_bytes: Positions, values and scales before compression.
        bytes: Its part of the compressed streams. A segment is shared by tensors, each bearing
            its share of the raw bytes, so this is exact for segments of one tensor's own.
    """

    name: str
    shape: tuple[int, ...]
    storage: str
    value_type: str
    bits: int
    nnz: int | None
    raw_bytes: int
    bytes: float

    @property
    def density(self) -> float | None:
        """Non-zero values for each element, ``None`` where it is not known."""
        return None if self.nnz is None else self.nnz / max(math.prod(self.shape), 1)


@dataclass(frozen=True)
class StreamInfo:
    """One stream of a packed file.

    Attributes:
        name: What it holds (g: gaps, v: values, s: scales, r: rest) and the bits of a word.
        segments: Parts that are compressed by themselves.
        codecs: How byte planes are stored, each codec once.
        raw_bytes: Bytes before compression.
        bytes: Bytes in the file.
    """

    name: str
    segments: int
    codecs: tuple[str, ...]
    raw_bytes: int
    bytes: int


@dataclass(frozen=True)
class PackedInfo:
    """What is in a packed file; ``str()`` gives a table.

    Attributes:
        tensors: In the order of the file, compressed ones first.
        streams: In the order of the file.
        aliases: Tied names to the names that hold their data.
        metadata: The user's.
        file_bytes: Size of the file.
    """

    tensors: tuple[TensorInfo, ...]
    streams: tuple[StreamInfo, ...]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    file_bytes: int

    @property
    def overhead_bytes(self) -> int:
        """Bytes of the file that are not in streams: header, hash, metadata and spec."""
        return self.file_bytes - sum(stream.bytes for stream in self.streams)

    def __str__(self) -> str:
        """Tables of the tensors and streams, then aliases, metadata and sizes."""
        lines = _table(
            ("tensor", "shape", "storage", "type", "bits", "nnz", "density", "bytes"),
            [_tensor_row(tensor) for tensor in self.tensors],
        )
        lines.append("")
        lines += _table(
            ("stream", "segments", "codecs", "raw bytes", "bytes"),
            [
                (s.name, str(s.segments), " ".join(s.codecs), f"{s.raw_bytes:,}", f"{s.bytes:,}")
                for s in self.streams
            ],
        )
        lines.append("")
        lines += [f"{_shown(a)} is tied to {_shown(name)}" for a, name in self.aliases.items()]
        lines += [f"{_shown(key)}: {_shown(text)}" for key, text in self.metadata.items()]
        lines.append(f"{self.file_bytes:,} bytes, of which {self.overhead_bytes:,} overhead")
        return "\n".join(lines)


def describe(spec: Spec, metadata: Mapping[str, str], file_bytes: int) -> PackedInfo:
    """The description of a file with this spec.

    Args:
        spec: Of the file.
        metadata: The user's.
        file_bytes: Size of the file.

    Returns:
        What to show.

    Example:
        >>> from lightning_condensa.deploy.spec import RestEntry, Segment, StoredStream
        >>> entry = RestEntry("bias", (2,), "F32")
        >>> streams = (StoredStream("r32", (Segment(2, (("raw", 2),) * 4),)),)
        >>> describe(Spec((), (entry,), {}, streams), {}, 300).tensors[0].bytes
        8.0
    """
    counts = stream_counts(spec.entries)
    streams = tuple(
        StreamInfo(
            name=stream.name,
            segments=len(stream.segments),
            codecs=tuple(dict.fromkeys(c for part in stream.segments for c, _ in part.chunks)),
            raw_bytes=counts[stream.name] * stream_width(stream.name),
            bytes=stream.stored_bytes,
        )
        for stream in spec.streams
    )
    shares = {stream.name: _Shares(stream) for stream in spec.streams}
    tensors = tuple(_describe_tensor(entry, shares) for entry in spec.entries)
    return PackedInfo(tensors, streams, spec.aliases, metadata, file_bytes)


class _Shares:
    """Hands out the stored bytes of a stream's words in order."""

    def __init__(self, stream: StoredStream) -> None:
        self._words = np.cumsum([0, *(part.words for part in stream.segments)])
        self._bytes = np.cumsum([0, *(part.stored_bytes for part in stream.segments)])
        self._position = 0

    def take(self, words: int) -> float:
        """The bytes of the next words, those of a segment in equal shares."""
        ends = [self._position, self._position + words]
        self._position += words
        begin, end = np.interp(ends, self._words, self._bytes)
        return float(end - begin)


def _describe_tensor(entry: Entry, shares: Mapping[str, _Shares]) -> TensorInfo:
    if isinstance(entry, RestEntry):
        storage, value_type, bits, nnz = "rest", entry.dtype, type_bits(entry.dtype), None
    else:
        storage, value_type = entry.storage, entry.value_type
        bits, nnz = entry.bits, entry.nnz
    return TensorInfo(
        name=entry.name,
        shape=entry.shape,
        storage=storage,
        value_type=value_type,
        bits=bits,
        nnz=nnz,
        raw_bytes=sum(count * stream_width(name) for name, count in entry.stored.items()),
        bytes=sum(shares[name].take(count) for name, count in entry.stored.items() if count),
    )


def _tensor_row(tensor: TensorInfo) -> tuple[str, ...]:
    return (
        _shown(tensor.name),
        "x".join(str(size) for size in tensor.shape) or "scalar",
        tensor.storage,
        tensor.value_type,
        str(tensor.bits),
        "" if tensor.nnz is None else f"{tensor.nnz:,}",
        "" if tensor.density is None else f"{tensor.density:.4f}",
        f"{tensor.bytes:,.0f}",
    )


def _shown(text: str) -> str:
    """A stranger's text without control characters, which could rewrite a terminal."""
    return text if text.isprintable() else ascii(text)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of left-aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
