"""Floating point operations of a forward pass, and how many of them touch a non-zero weight."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass
class FlopCount:
    """Operations of one module, those of its children not counted.

    Attributes:
        dense: All of them.
        effective: Those that touch a non-zero weight.
    """

    dense: int = 0
    effective: float = 0.0


def count_flops(
    module: nn.Module, inputs: tuple[Any, ...], parts: Mapping[str, float] | None = None
) -> dict[str, FlopCount]:
    """Count with PyTorch's formulas (``torch.utils.flop_counter``) on the meta device.

    LSTMs and fused attention fall apart there into products that can be counted (on CPU they
    cannot). A product with a weight, or with a part of one, is scaled by the density of what it
    reads; products without weights, as in attention, count in full.

    Args:
        module: In any mode; not changed.
        inputs: Positional inputs.
        parts: Densities by name of the parameters that are computed with part by part: sums and
            products of tensors.

    Returns:
        Counts by the name of the module that is the innermost when an operation runs; the root's
        name is empty.

    Example:
        >>> counts = count_flops(nn.Sequential(nn.Linear(8, 4)), (torch.rand(2, 8),))
        >>> counts["0"].dense
        128
    """
    meta = deepcopy(module).to("meta").eval()
    counter = _Counter(module, meta, parts or {})
    for name, part in meta.named_modules():
        part.register_forward_pre_hook(counter.enter(name))
        part.register_forward_hook(counter.leave)
    with counter, torch.no_grad():
        meta(*(i.to("meta") if isinstance(i, Tensor) else i for i in inputs))
    return dict(counter.counts)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the products of a forward pass on ``meta``, with the densities of ``module``."""

    def __init__(self, module: nn.Module, meta: nn.Module, parts: Mapping[str, float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[str, FlopCount] = defaultdict(FlopCount)
        self._inside = [""]
        weights = dict(module.named_parameters(remove_duplicate=False))
        self._weights = {
            _storage(parameter): weights[name].detach()
            for name, parameter in meta.named_parameters(remove_duplicate=False)
            if parameter.dim() > 1
        }
        self._parts = {
            _storage(parameter): min(parts[name], 1.0)
            for name, parameter in meta.named_parameters()
            if name in parts
        }

    def enter(self, name: str) -> Any:
        """A hook that runs before the forward of a module."""
        return lambda *_: self._inside.append(name)

    def leave(self, *_: Any) -> None:
        """A hook that runs after it."""
        self._inside.pop()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            count = self.counts[self._inside[-1]]
            count.dense += flops
            count.effective += flops * math.prod(self._density(a) for a in args)
        return out

    def _density(self, operand: Any) -> float:
        """Share of non-zeros that a weight, or a view of one, reads; 1 for other operands."""
        if not isinstance(operand, Tensor) or _storage(operand) not in self._weights:
            return 1.0
        if _storage(operand) in self._parts:
            return self._parts[_storage(operand)]
        weight = self._weights[_storage(operand)]
        offset = weight.storage_offset() + operand.storage_offset()
        read = weight.as_strided(operand.shape, operand.stride(), offset)
        return int(torch.count_nonzero(read)) / max(read.numel(), 1)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
