"""How many bits a stored value takes."""

from __future__ import annotations

import torch


def dtype_bits(dtype: torch.dtype) -> int:
    """Bits of one element of ``dtype``.

    Example:
        >>> dtype_bits(torch.float16)
        16
    """
    return dtype.itemsize * 8
