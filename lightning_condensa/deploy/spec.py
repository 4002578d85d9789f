"""The spec of a packed file: what each tensor is and where its bytes stand."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lightning_condensa.deploy.checked_json import dump_json
from lightning_condensa.deploy.words import DTYPES, Words, word_type

VALUE_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I8", "U8")
"""Types of codes."""

WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
"""Types of decoded weights."""

MAX_DIMENSIONS = 64
MAX_NUMEL = 2**48
MAX_SPEC_BYTES = 2**24
MAX_ALPHABET = 256
"""Codes that one byte can tell apart."""

GAPS = "g8"
SCALES = "s32"
_STREAMS = (GAPS, "v8", "v16", "v32", "v64", SCALES, "r8", "r16", "r32", "r64")


@dataclass(frozen=True)
class EncodedEntry:
    """One compressed tensor: a weight, or a factor or term of one.

    Attributes:
        name: Its key in a state dict; for messages only where it is a part of a weight.
        shape: Of the weight and its codes.
        nnz: Codes whose bit pattern is not zero.
        gap_bytes: Bytes of its positions, ``None`` where all codes are stored (dense).
        value_type: Type of the codes, one of `VALUE_TYPES`.
        bits: Bits of one stored value: those of the value type, or 8 with an alphabet.
        weight_type: Type of the decoded weight, one of `WEIGHT_TYPES`.
        scale_shape: Shape of its float32 scale, ``None`` without one.
        group: Elements in a row that share a scale, where the scale does not broadcast.
        alphabet: Bit patterns of the codes, ascending, where stored values are indices into it.
    """

    name: str
    shape: tuple[int, ...]
    nnz: int
    gap_bytes: int | None
    value_type: str
    bits: int
    weight_type: str
    scale_shape: tuple[int, ...] | None
    group: int | None = None
    alphabet: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def sparse(self) -> bool:
        """Whether positions and non-zero codes are stored, instead of all codes."""
        return self.gap_bytes is not None

    @property
    def storage(self) -> str:
        """How it is stored, in a word."""
        return "sparse" if self.sparse else "dense"

    @property
    def alphabet_words(self) -> Words | None:
        """The alphabet as words of the value type."""
        if self.alphabet is None:
            return None
        return np.array(self.alphabet, dtype=word_type(type_bits(self.value_type)))

    @property
    def leaves(self) -> tuple[EncodedEntry, ...]:
        """Itself: all that is stored of it."""
        return (self,)

    @property
    def stored(self) -> dict[str, int]:
        """Words that it takes from each stream."""
        return {
            GAPS: self.gap_bytes or 0,
            f"v{self.bits}": self.nnz if self.sparse else self.numel,
            SCALES: 0 if self.scale_shape is None else math.prod(self.scale_shape),
        }


@dataclass(frozen=True)
class CombinedEntry:
    """One compressed weight that is a sum of terms, each a tensor or the product of two.

    Attributes:
        name: Its key in a state dict.
        shape: Of the weight.
        terms: The parts of each term, one or two.
    """

    name: str
    shape: tuple[int, ...]
    terms: tuple[tuple[EncodedEntry, ...], ...]

    @property
    def leaves(self) -> tuple[EncodedEntry, ...]:
        """All parts, in the order in which they are stored."""
        return tuple(part for term in self.terms for part in term)

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """Codes of all parts whose bit pattern is not zero."""
        return sum(leaf.nnz for leaf in self.leaves)

    @property
    def value_type(self) -> str:
        """Types of the codes, each once."""
        return "+".join(dict.fromkeys(leaf.value_type for leaf in self.leaves))

    @property
    def bits(self) -> int:
        """Bits of one stored value, of the widest part."""
        return max(leaf.bits for leaf in self.leaves)

    @property
    def storage(self) -> str:
        """How it is stored, in a word."""
        return "product" if len(self.terms) == 1 else "sum"

    @property
    def stored(self) -> dict[str, int]:
        """Words that it takes from each stream."""
        counts: Counter[str] = Counter()
        for leaf in self.leaves:
            counts.update(leaf.stored)
        return dict(counts)


@dataclass(frozen=True)
class RestEntry:
    """One tensor stored as it is.

    Attributes:
        name: Its key in a state dict.
        shape: Its shape.
        dtype: Its type, a name of `DTYPES`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def stored(self) -> dict[str, int]:
        """Words that it takes from each stream."""
        return {f"r{type_bits(self.dtype)}": self.numel}


Entry: TypeAlias = EncodedEntry | CombinedEntry | RestEntry


@dataclass(frozen=True)
class Segment:
    """Consecutive words of a stream: byte planes, one chunk each.

    Attributes:
        words: How many.
        chunks: Codec and stored bytes of each plane, least significant first.
    """

    words: int
    chunks: tuple[tuple[str, int], ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        return sum(size for _, size in self.chunks)


@dataclass(frozen=True)
class StoredStream:
    """One stream of equally wide words.

    Attributes:
        name: What it holds and the bits of a word, as in ``v16``.
        segments: Its words in order.
    """

    name: str
    segments: tuple[Segment, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        return sum(segment.stored_bytes for segment in self.segments)


@dataclass(frozen=True)
class Spec:
    """All that a packed file says about its data.

    Attributes:
        encoded: Compressed tensors in order.
        rest: Other tensors in order.
        aliases: Tied names to the names that hold their data.
        streams: In the order of `stream_counts`.
    """

    encoded: tuple[EncodedEntry | CombinedEntry, ...]
    rest: tuple[RestEntry, ...]
    aliases: dict[str, str]
    streams: tuple[StoredStream, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All tensors, in the order in which they take words from the streams."""
        return (*self.encoded, *self.rest)


def type_bits(name: str) -> int:
    """Bits of one element of a type in `DTYPES`.

    Example:
        >>> type_bits("BF16")
        16
    """
    return 8 * DTYPES[name].itemsize


def stream_counts(entries: Iterable[Entry]) -> dict[str, int]:
    """Words in each stream of a file that holds these entries, in the order of the file.

    Example:
        >>> stream_counts([RestEntry("bias", (3,), "F32"), RestEntry("steps", (), "I64")])
        {'r32': 3, 'r64': 1}
    """
    counts = dict.fromkeys(_STREAMS, 0)
    for entry in entries:
        for name, count in entry.stored.items():
            counts[name] += count
    return {name: count for name, count in counts.items() if count}


def stream_width(name: str) -> int:
    """Planes of a stream, which are the bytes of its words.

    Example:
        >>> stream_width("v16")
        2
    """
    return int(name[1:]) // 8


def scale_fits(scale_shape: tuple[int, ...], shape: tuple[int, ...], group: int | None) -> bool:
    """Whether a scale broadcasts to the shape of the codes, or has one number for each group.

    Example:
        >>> scale_fits((4, 1), (4, 9), None), scale_fits((4, 9), (9,), None)
        (True, False)
        >>> scale_fits((4, 3), (4, 9), 4)
        True
    """
    if group is None:
        pairs = zip(reversed(scale_shape), reversed(shape), strict=False)
        fits = all(scale in (1, size) for scale, size in pairs)
        return fits and len(scale_shape) <= len(shape)
    pairs = zip(scale_shape, shape, strict=False)
    fits = all(scale in (1, size, math.ceil(size / group)) for scale, size in pairs)
    return fits and len(scale_shape) == len(shape)


def dump_spec(spec: Spec) -> bytes:
    """The spec as zlib-compressed JSON: always zlib, so that any reader can inspect any file.

    Raises:
        ValueError: If there are so many tensors that no reader would accept it.

    Example:
        >>> zlib.decompress(dump_spec(Spec((), (), {}, ()))).decode()
        '{"aliases":{},"encoded":[],"rest":[],"streams":[]}'
    """
    encoded = [_dump_encoded(entry) for entry in spec.encoded]
    rest = [[e.name, e.shape, e.dtype] for e in spec.rest]
    streams = [[s.name, [[part.words, part.chunks] for part in s.segments]] for s in spec.streams]
    text = dump_json(
        {"encoded": encoded, "rest": rest, "aliases": spec.aliases, "streams": streams}
    )
    if len(text) > MAX_SPEC_BYTES:
        raise ValueError(f"the spec takes {len(text)} bytes, at most {MAX_SPEC_BYTES} can be read")
    return zlib.compress(text, 9)


def _dump_encoded(entry: EncodedEntry | CombinedEntry) -> object:
    if isinstance(entry, CombinedEntry):
        terms = [[_fields(part) for part in term] for term in entry.terms]
        return {"name": entry.name, "shape": entry.shape, "terms": terms}
    return [entry.name, *_fields(entry)]


def _fields(e: EncodedEntry) -> list[object]:
    return [
        *(e.shape, e.nnz, e.gap_bytes, e.value_type, e.bits, e.weight_type),
        *(e.scale_shape, e.group, e.alphabet),
    ]
