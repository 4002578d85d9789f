"""One tensor as words of the streams of a packed file, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.spec import (
    GAPS,
    MAX_ALPHABET,
    MAX_DIMENSIONS,
    SCALES,
    VALUE_TYPES,
    WEIGHT_TYPES,
    EncodedEntry,
    RestEntry,
    scale_fits,
    stream_width,
    type_bits,
)
from lightning_condensa.deploy.streams import (
    decode_gaps,
    encode_gaps,
    estimate_size,
    split_planes,
)
from lightning_condensa.deploy.words import (
    DTYPES,
    Words,
    dtype_name,
    tensor_to_words,
    word_type,
    words_to_tensor,
)
from lightning_condensa.schemes.encoded import Encoded

_PROBE = 4096  # words that tell whether an alphabet is worth a look at all of them

Parts: TypeAlias = dict[str, Words]
"""What one tensor adds to each stream."""


@dataclass
class StreamReader:
    """Hands out the words of each stream in order.

    Attributes:
        streams: All words of each stream.
        positions: Words of each stream handed out so far.
    """

    streams: Mapping[str, Words]
    positions: Counter[str] = field(default_factory=Counter)

    def take(self, counts: Mapping[str, int]) -> Parts:
        """The next words of each stream named in ``counts``, as views."""
        parts: Parts = {}
        for name, count in counts.items():
            begin = self.positions[name]
            self.positions[name] += count
            # A file has no empty streams.
            words = self.streams.get(name, np.empty(0, word_type(8 * stream_width(name))))
            parts[name] = words[begin : begin + count]
        return parts


def pack_encoded(name: str, encoded: Encoded) -> tuple[EncodedEntry, Parts]:
    """A compressed tensor as an entry of the spec and words.

    It is stored sparse where that is estimated to be smaller. A code counts as non-zero when its
    bit pattern is not zero.

    Args:
        name: Its key in a state dict.
        encoded: Codes of a type in `VALUE_TYPES`; a scale, if any, float32.

    Returns:
        The entry, and its words by stream.

    Raises:
        ValueError: If it cannot be stored; the message names the tensor.

    Example:
        >>> codes = torch.tensor([0, 0, 0, 7] * 8, dtype=torch.int8)
        >>> entry, parts = pack_encoded("weight", Encoded(codes, torch.float32))
        >>> entry.sparse, parts["g8"].tolist(), parts["v8"].tolist()
        (True, [3, 3, 3, 3, 3, 3, 3, 3], [7, 7, 7, 7, 7, 7, 7, 7])
    """
    value_type = _storable(encoded.codes, f"the codes of {name!r}", VALUE_TYPES)
    weight_type = dtype_name(encoded.dtype)
    if weight_type not in WEIGHT_TYPES:
        raise ValueError(f"the weight {name!r} is {encoded.dtype}, stored are {WEIGHT_TYPES}")
    shape = tuple(encoded.codes.shape)
    codes = tensor_to_words(encoded.codes)
    indices = np.flatnonzero(codes)
    gaps = encode_gaps(indices)
    values = codes[indices]
    stored, sparse = _shortest(codes), False
    # Codes that are all non-zero need no comparison, which saves the time on dense models.
    if len(values) < len(codes):
        kept = _shortest(values)
        if estimate_size([gaps]) + kept.size < stored.size:
            stored, sparse = kept, True
    bits = 8 * stored.words.itemsize
    parts: Parts = {f"v{bits}": stored.words}
    if sparse:
        parts[GAPS] = gaps
    scale_shape: tuple[int, ...] | None = None
    if encoded.scale is not None:
        _storable(encoded.scale, f"the scale of {name!r}", ("F32",))
        scale_shape = tuple(encoded.scale.shape)
        if not scale_fits(scale_shape, shape, encoded.group):
            raise ValueError(f"the scale of {name!r}, {scale_shape}, does not broadcast to {shape}")
        parts[SCALES] = tensor_to_words(encoded.scale)
    entry = EncodedEntry(
        name=name,
        shape=shape,
        nnz=len(values),
        gap_bytes=len(gaps) if sparse else None,
        value_type=value_type,
        bits=bits,
        weight_type=weight_type,
        scale_shape=scale_shape,
        group=None if scale_shape is None else encoded.group,
        alphabet=stored.alphabet,
    )
    return entry, parts


class _Stored(NamedTuple):
    """Words, or bytes that are indices into an alphabet of them, and about how many bytes it takes.

    An entry of the alphabet takes a little more than its own bytes: digits in the spec.
    """

    words: Words
    alphabet: tuple[int, ...] | None
    size: float


def _shortest(words: Words) -> _Stored:
    """Words as they are, or as indices where they take few values: those of a codebook, say."""
    plain = _Stored(words, None, estimate_size(split_planes(words)))
    if words.itemsize == 1 or len(np.unique(words[:_PROBE])) > MAX_ALPHABET:
        return plain
    alphabet, indices = np.unique(words, return_inverse=True)
    if not 0 < len(alphabet) <= MAX_ALPHABET:
        return plain
    narrow = indices.astype(np.uint8)
    size = estimate_size([narrow]) + 1.25 * alphabet.nbytes
    short = _Stored(narrow, tuple(alphabet.tolist()), size)
    return min(plain, short, key=lambda stored: stored.size)


def unpack_encoded(entry: EncodedEntry, reader: StreamReader) -> Encoded:
    """The inverse of `pack_encoded`, but for the mask.

    Args:
        entry: Consistent with the streams.
        reader: Where its words come next.

    Returns:
        The tensor; its mask is true where the bits of its codes are not zero if it is stored
        sparse, else ``None``.

    Raises:
        PackedFileError: If its words contradict the entry.
    """
    parts = reader.take(entry.stored)
    codes = parts[f"v{entry.bits}"]
    if entry.alphabet is not None:
        codes = _looked_up(codes, entry)
    if np.count_nonzero(codes) != entry.nnz:
        raise PackedFileError(f"tensor {entry.name!a} does not hold {entry.nnz} non-zero codes")
    mask: Tensor | None = None
    if entry.sparse:
        support = np.zeros(entry.numel, dtype=np.bool_)
        codes = _scatter(codes, parts[GAPS], entry, support)
        mask = torch.from_numpy(support).reshape(entry.shape)
    else:
        codes = codes.copy()
    scale: Tensor | None = None
    if entry.scale_shape is not None:
        scale = words_to_tensor(parts[SCALES].copy(), torch.float32, entry.scale_shape)
    return Encoded(
        codes=words_to_tensor(codes, DTYPES[entry.value_type], entry.shape),
        dtype=DTYPES[entry.weight_type],
        scale=scale,
        mask=mask,
        group=entry.group,
    )


def _looked_up(indices: Words, entry: EncodedEntry) -> Words:
    """The codes of an alphabet that indices stand for."""
    alphabet = np.array(entry.alphabet, dtype=word_type(type_bits(entry.value_type)))
    if len(indices) and indices.max() >= len(alphabet):
        raise PackedFileError(f"tensor {entry.name!a} has indices beyond its alphabet")
    codes: Words = alphabet[indices]
    return codes


def pack_rest(name: str, tensor: Tensor) -> tuple[RestEntry, Parts]:
    """Any other tensor as an entry of the spec and words.

    Args:
        name: Its key in a state dict.
        tensor: Of a type in `DTYPES`.

    Returns:
        The entry, and its words by stream.

    Raises:
        ValueError: If it cannot be stored; the message names the tensor.

    Example:
        >>> entry, parts = pack_rest("steps", torch.tensor(3))
        >>> entry, parts["r64"].tolist()
        (RestEntry(name='steps', shape=(), dtype='I64'), [3])
    """
    dtype = _storable(tensor, repr(name), DTYPES)
    return RestEntry(name, tuple(tensor.shape), dtype), {
        f"r{type_bits(dtype)}": tensor_to_words(tensor)
    }


def unpack_rest(entry: RestEntry, reader: StreamReader) -> Tensor:
    """The inverse of `pack_rest`.

    Args:
        entry: Consistent with the streams.
        reader: Where its words come next.

    Returns:
        The tensor.

    Raises:
        PackedFileError: If the bytes are no values of its type.
    """
    (words,) = reader.take(entry.stored).values()
    if entry.dtype == "BOOL" and np.any(words > 1):
        raise PackedFileError(
            f"tensor {entry.name!a} is boolean but holds other bytes than 0 and 1"
        )
    return words_to_tensor(words.copy(), DTYPES[entry.dtype], entry.shape)


def _scatter(values: Words, gaps: Words, entry: EncodedEntry, support: NDArray[np.bool_]) -> Words:
    """The dense codes; ``support`` becomes true where they come from ``values``."""
    indices = decode_gaps(gaps.astype(np.uint8, copy=False))
    if len(indices) != entry.nnz:
        raise PackedFileError(
            f"tensor {entry.name!a} has {len(indices)} positions, not {entry.nnz}"
        )
    if len(indices) and indices[-1] >= entry.numel:
        raise PackedFileError(
            f"tensor {entry.name!a} has positions beyond its {entry.numel} elements"
        )
    codes = np.zeros(entry.numel, dtype=values.dtype)
    codes[indices] = values
    support[indices] = True
    return codes


def _storable(tensor: Tensor, what: str, types: Collection[str]) -> str:
    """The name of the tensor's type, which must be one of ``types``."""
    name = dtype_name(tensor.dtype)
    if name is None or name not in types:
        raise ValueError(f"{what}: {tensor.dtype} cannot be stored, only {', '.join(types)}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{what}: only strided tensors with data can be stored")
    if tensor.dim() > MAX_DIMENSIONS:
        raise ValueError(f"{what}: {tensor.dim()} dimensions, at most {MAX_DIMENSIONS}")
    return name
