"""Δ(θ) straight into the memory of a weight, without θ as tensors in between."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_condensa.deploy.spec import GAPS, EncodedEntry
from lightning_condensa.deploy.streams import BLOCK, positions
from lightning_condensa.deploy.tensor_codec import Parts
from lightning_condensa.deploy.words import DTYPES, Words, word_type, words_in, words_to_tensor

_WORTH_PAIRS = 8
"""As many times the entries of a table of pairs: it takes as long as looking up one eighth."""

_PRODUCTS = 4 * BLOCK
"""Products that stay in the cache while they are computed."""

_INTEGERS = {"I8": np.int8, "U8": np.uint8}
"""Types of codes that numpy knows and that are not floating point."""

_Convert: TypeAlias = Callable[[Words], Words]
"""Codes to the words of a weight without a scale."""


def decode_into(out: Tensor, entry: EncodedEntry, parts: Parts, scale: Tensor | None) -> bool:
    """Decode into memory that is there, block by block, where θ is of a usual form.

    Usual is: no scale; or one scale, or one for each row of the first dimensions, and codes as
    they are. The result has the bits of `Encoded.decode`.

    Args:
        out: Contiguous, of the entry's shape and weight type; overwritten.
        entry: The tensor.
        parts: Its words, checked.
        scale: As the entry describes it.

    Returns:
        Whether it was done; ``out`` is as it was if not.
    """
    flat = out.view(-1)
    codes = parts[f"v{entry.bits}"]
    gaps = parts[GAPS].view(np.uint8)
    if scale is None:
        table = _table(entry)
        convert = _conversion(entry, table)
        if entry.sparse:
            _scatter(flat, gaps, lambda begin, block: convert(codes[begin : begin + len(block)]))
        elif table is not None:
            look_up(table, codes, words_in(flat))
        else:
            words = words_in(flat)
            for part in _blocks(len(codes)):
                words[part] = convert(codes[part])
        return True
    row = row_length(entry)
    # Every zero times an infinite scale is NaN.
    if row is None or entry.alphabet is not None or not bool(scale.isfinite().all()):
        return False
    scales = scale.flatten()
    if entry.sparse:

        def scaled(begin: int, block: NDArray[np.int64]) -> Words:
            values = _tensor(codes[begin : begin + len(block)], entry.value_type).float()
            factors = scales if len(scales) == 1 else torch.from_numpy(scales.numpy()[block // row])
            return words_in(values.mul_(factors).add_(0.0).to(out.dtype))

        _scatter(flat, gaps, scaled)
    else:
        _multiply(flat.view(-1, row), codes.reshape(-1, row), scales, entry.value_type)
    return True


def row_length(entry: EncodedEntry) -> int | None:
    """How many elements in a row share a scale; ``None`` where that is not how they share it.

    Example:
        >>> row_length(EncodedEntry("w", (4, 6), 0, None, "I8", 8, "F32", (4, 1)))
        6
    """
    scale = entry.scale_shape or ()
    if math.prod(scale) == 1:
        return max(entry.numel, 1)
    kept = len(scale)
    while kept and scale[kept - 1] == 1:
        kept -= 1
    rows = len(scale) == len(entry.shape) and scale[:kept] == entry.shape[:kept]
    return math.prod(entry.shape[kept:]) if rows and entry.numel else None


def look_up(table: Words, indices: Words, out: Words) -> None:
    """Table entries to where they belong, in long runs two at a time.

    Args:
        table: Up to 256 words.
        indices: ``(n,)`` bytes, all within the table.
        out: ``(n,)`` words to overwrite.

    Example:
        >>> out = np.zeros(3, np.uint16)
        >>> look_up(np.array([7, 9], np.uint16), np.array([1, 0, 1], np.uint8), out)
        >>> out.tolist()
        [9, 7, 9]
    """
    pairs, size = len(out) // 2, len(table)
    if out.itemsize > 4 or pairs < _WORTH_PAIRS * size**2:
        for part in _blocks(len(out)):
            np.take(table, indices[part], out=out[part], mode="clip")
        return
    # A pair of bytes is a number of two digits to the base of 256.
    both = np.zeros((size, 256, 2), table.dtype)
    first, second = (0, 1) if sys.byteorder == "little" else (1, 0)
    both[:, :size, first], both[:, :size, second] = table, table[:, None]
    wide = both.reshape(-1).view(word_type(16 * out.itemsize))
    numbers, wide_out = indices[: 2 * pairs].view(np.uint16), out[: 2 * pairs].view(wide.dtype)
    for part in _blocks(pairs):
        np.take(wide, numbers[part], out=wide_out[part], mode="clip")
    np.take(table, indices[2 * pairs :], out=out[2 * pairs :], mode="clip")


def _table(entry: EncodedEntry) -> Words | None:
    """What each index into the alphabet decodes to."""
    if (alphabet := entry.alphabet_words) is None:
        return None
    return words_in(_tensor(alphabet, entry.value_type).to(DTYPES[entry.weight_type]))


def _conversion(entry: EncodedEntry, table: Words | None) -> _Convert:
    if table is not None:
        return lambda indices: np.take(table, indices, mode="clip")
    if entry.value_type == entry.weight_type:
        return lambda codes: codes
    dtype = DTYPES[entry.weight_type]
    return lambda codes: words_in(_tensor(codes, entry.value_type).to(dtype))


def _scatter(flat: Tensor, gaps: Words, values: Callable[[int, NDArray[np.int64]], Words]) -> None:
    """Zeros, but for values at the positions that gaps tell; ``values`` gets rank and positions."""
    flat.zero_()
    words = words_in(flat)
    done = 0
    for block in positions(gaps):
        words[block] = values(done, block)
        done += len(block)


def _multiply(out: Tensor, codes: Words, scales: Tensor, value_type: str) -> None:
    """Rows of codes times their scales."""
    rows, columns = out.shape
    scales = scales.view(-1, 1)
    if out.dtype == torch.float32 and value_type in _INTEGERS and bool((scales > 0).all()):
        # Products of integers and positive numbers are never −0.0.
        # First to floats, in pieces that stay in the cache: numpy's own buffers take twice as long.
        integers, factors, products = codes.view(_INTEGERS[value_type]), scales.numpy(), out.numpy()
        for down in _blocks(rows, max(_PRODUCTS // columns, 1)):
            np.copyto(products[down], integers[down])
            np.multiply(products[down], factors[down], out=products[down])
        return
    for across in _blocks(columns):
        step = max(BLOCK // (across.stop - across.start), 1)
        for down in _blocks(rows, step):
            block = out[down, across]
            values = _tensor(codes[down, across], value_type)
            # In float32, as `Encoded.decode` multiplies.
            product = block if block.dtype == torch.float32 else torch.empty(block.shape)
            product.copy_(values).mul_(scales[down]).add_(0.0)
            if product is not block:
                block.copy_(product)


def _blocks(count: int, step: int = BLOCK) -> Iterator[slice]:
    return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))


def _tensor(words: Words, value_type: str) -> Tensor:
    """A copy, as torch warns of memory that it must not write to."""
    return words_to_tensor(words.copy().reshape(-1), DTYPES[value_type], words.shape)
