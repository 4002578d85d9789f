"""The check that training has not diverged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_condensa.functional.placement import local
from lightning_condensa.functional.ranks import Ranks


class NotFiniteError(ValueError):
    """A weight to compress is not finite: training has diverged."""


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`NotFiniteError`, on all processes, if a tensor holds NaN or infinity.

    Args:
        tensors: By the names that the error gives; DTensors make this a collective call.
    """
    parts = [local(t) for t in tensors.values()]
    # One reduction without a temporary; only where it is not finite, which a sum of finite values
    # can be too, each element is looked at.
    sums = [p.sum(dtype=torch.promote_types(p.dtype, torch.float32)) for p in parts]
    bad = [
        not bool(total.isfinite()) and not bool(part.isfinite().all())
        for total, part in zip(sums, parts, strict=True)
    ]
    counts = Ranks.holding(list(tensors.values())).totals(bad)
    for name, count in zip(tensors, counts, strict=True):
        if count:
            raise NotFiniteError(f"{name} holds values that are not finite: training has diverged")
