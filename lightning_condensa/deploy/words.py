"""Tensors as unsigned machine words: bit patterns, so that -0.0 and NaN payloads survive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "C64": torch.complex64,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""What a packed file may hold, under the names of the safetensors format."""

_NAMES = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})


def dtype_name(dtype: torch.dtype) -> str | None:
    """The name of ``dtype`` in a packed file, ``None`` if a file cannot hold it.

    Example:
        >>> dtype_name(torch.bfloat16)
        'BF16'
    """
    return _NAMES.get(dtype)


def word_type(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The unsigned type of ``bits`` bits: 8, 16, 32 or 64.

    Example:
        >>> word_type(16)
        dtype('uint16')
    """
    return np.dtype(f"uint{bits}")


def tensor_to_words(tensor: Tensor) -> Words:
    """The bit patterns of a tensor's elements, in row-major order.

    Args:
        tensor: Any strided tensor of a type in `DTYPES`, any shape and device.

    Returns:
        ``(N,)`` unsigned words as wide as the elements. May share memory with ``tensor``.

    Example:
        >>> [hex(word) for word in tensor_to_words(torch.tensor([1.0, -0.0]))]
        ['0x3f800000', '0x80000000']
    """
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Not reshape: the stride of an empty or one-element tensor may be 0, which no view accepts.
    flat = dense.as_strided((dense.numel(),), (1,))
    words: Words = flat.view(torch.uint8).numpy().view(word_type(8 * tensor.element_size()))
    return words


def words_to_tensor(words: Words, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The inverse of `tensor_to_words`; the tensor takes over the memory of ``words``.

    Args:
        words: ``(N,)`` contiguous, writable words as wide as ``dtype``.
        dtype: A type in `DTYPES`.
        shape: A shape of N elements.

    Returns:
        A CPU tensor.

    Example:
        >>> words_to_tensor(np.array([0x3F80], np.uint16), torch.bfloat16, (1, 1))
        tensor([[1.]], dtype=torch.bfloat16)
    """
    return torch.from_numpy(words.view(np.uint8)).view(dtype).reshape(tuple(shape))


def words_in(tensor: Tensor) -> Words:
    """The elements of a contiguous CPU tensor as words in its own memory, to be written to.

    Example:
        >>> tensor = torch.zeros(2)
        >>> words_in(tensor)[0] = 0x3F800000
        >>> tensor
        tensor([1., 0.])
    """
    flat = tensor.view(-1).view(torch.uint8)
    words: Words = flat.numpy().view(word_type(8 * tensor.element_size()))
    return words
