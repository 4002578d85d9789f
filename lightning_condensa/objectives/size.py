"""Objectives that are counted: bytes, parameters, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.objectives.base import Objective, example_of


class MemoryFootprint(Objective):
    """Bytes of the compressed model.

    Args:
        count: ``"file"``, the size of the packed file with everything in it (the default), or
            ``"values"``, the paper's count: the bytes of all non-zero values, positions not
            counted. :meth:`details` reports both.
    """

    unit: ClassVar[str] = "bytes"

    def __init__(self, count: Literal["file", "values"] = "file") -> None:
        if count not in ("file", "values"):
            raise ValueError(f"count must be 'file' or 'values', got {count!r}")
        self.count = count

    def __call__(self, compressed: CompressedModel) -> float:
        """Bytes."""
        return float(compressed.file_bytes() if self.count == "file" else compressed.value_bytes)

    def details(self, compressed: CompressedModel) -> dict[str, Any]:
        """Both counts."""
        figures = {"file_bytes": compressed.file_bytes(), "value_bytes": compressed.value_bytes}
        return {"value": float(figures[f"{self.count.removesuffix('s')}_bytes"]), **figures}


class FileSize(MemoryFootprint):
    """Bytes of the packed file: :class:`MemoryFootprint` under its plain name."""

    def __init__(self) -> None:
        super().__init__("file")


class Parameters(Objective):
    """Non-zero parameters of the whole module; of a sum or product those of its parts."""

    unit: ClassVar[str] = "weights"

    def __call__(self, compressed: CompressedModel) -> float:
        """Count of non-zeros."""
        named = compressed.module.named_parameters()
        other = [p for n, p in named if n not in compressed.theta]
        kept = sum(encoding.nnz for encoding in compressed.theta.values())
        return float(kept + sum(int(torch.count_nonzero(p)) for p in other))


class FLOPs(Objective):
    """Floating point operations of one forward pass that touch a non-zero weight.

    Counted with PyTorch's formulas (``torch.utils.flop_counter``) on the meta device, where LSTMs
    and fused attention fall apart into products that can be counted (on CPU they cannot). A
    product with a weight, or with a part of one, is scaled by the density of what it reads;
    products without weights, as in attention, count in full. This is what an execution that skips
    zeros has to do; a dense engine does more. A weight that is a sum or product counts as many
    operations as its parts have non-zeros, at most as many as a dense one.

    Args:
        example: An input batch, or a tuple of positional inputs; the module's
            ``example_input_array`` where ``None``.
    """

    unit: ClassVar[str] = "FLOPs"

    def __init__(self, example: Any = None) -> None:
        self.example = example

    def __call__(self, compressed: CompressedModel) -> float:
        """Operations per forward pass of the example."""
        return float(self.details(compressed)["value"])

    def details(self, compressed: CompressedModel) -> dict[str, Any]:
        """Dense and effective operations."""
        module = compressed.module
        inputs = example_of(module, self.example, self.name)
        meta = deepcopy(module).to("meta").eval()
        parts = {n: e.density for n, e in compressed.theta.items() if len(e.leaves) > 1}
        counter = _Counter(module, meta, parts)
        with counter, torch.no_grad():
            meta(*(i.to("meta") if isinstance(i, Tensor) else i for i in inputs))
        return {"value": counter.effective, "dense": counter.dense}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the products of a forward pass on ``meta``, with the densities of ``module``.

    Args:
        module: Holds the values.
        meta: The same module on the meta device.
        parts: Densities of the parameters, by name, that are computed with part by part.
    """

    def __init__(self, module: nn.Module, meta: nn.Module, parts: Mapping[str, float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dense = 0
        self.effective = 0.0
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
            self.dense += flops
            self.effective += flops * math.prod(self._density(a) for a in args)
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
