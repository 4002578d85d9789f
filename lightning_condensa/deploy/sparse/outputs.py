"""Whether a model computed in another way gives the same outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def alike(ours: Any, wanted: Any, tolerance: float) -> bool:
    """Whether all tensors in two outputs are the same but for rounding.

    What is not finite must be the same; so must integers.

    Args:
        ours: An output of any structure.
        wanted: One of the same structure.
        tolerance: Largest difference, as a share of the largest finite magnitude of a tensor.
    """
    pairs = zip(tree_leaves(ours), tree_leaves(wanted), strict=True)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(_close(a, b, tolerance) for a, b in tensors)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.numel() == 0 or not a.is_floating_point():
        return torch.equal(a, b)
    limit = tolerance * float(b.abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(a, b, rtol=0, atol=limit, equal_nan=True)
