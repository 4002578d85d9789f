"""One tensor as words of the streams of a packed file; `stored_tensor` has the way back."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_condensa.deploy.chunks import estimate_size
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
    type_bits,
)
from lightning_condensa.deploy.streams import encode_gaps, split_planes
from lightning_condensa.deploy.words import (
    DTYPES,
    Words,
    dtype_name,
    tensor_to_words,
)
from lightning_condensa.schemes.encoded import Encoded

_NOTICEABLE = 0.98  # Positions take time to follow: not for less than that.
_PROBE = 4096  # words that tell whether an alphabet is worth a look at all of them

Parts: TypeAlias = dict[str, Words]
"""What one tensor adds to each stream."""


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
        if estimate_size([gaps]) + kept.size < _NOTICEABLE * stored.size:
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
