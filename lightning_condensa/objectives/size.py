"""Objectives that are counted: bytes, parameters, FLOPs."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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
    """Non-zero parameters of the whole module."""

    unit: ClassVar[str] = "weights"

    def __call__(self, compressed: CompressedModel) -> float:
        """Count of non-zeros."""
        return float(sum(int(torch.count_nonzero(p)) for p in compressed.module.parameters()))


class FLOPs(Objective):
    """Floating point operations of one forward pass that touch a non-zero weight.

    Counted by PyTorch's ``FlopCounterMode`` on the meta device (on CPU it misses LSTMs and fused
    attention), layer by layer; a layer's count is scaled by the density of its weights. Products
    without weights, as in attention, count in full. This is what an execution that skips zeros
    has to do; a dense engine does more.

    Args:
        example: An input batch, or a tuple of positional inputs; the module's
            ``example_input_array`` where ``None``.
    """

    unit: ClassVar[str] = "FLOPs"

    def __init__(self, example: Any = None) -> None:
        self.example = example

    def __call__(self, compressed: CompressedModel) -> float:
        """Operations per forward pass of the example."""
        return self.details(compressed)["value"]  # type: ignore[no-any-return]

    def details(self, compressed: CompressedModel) -> dict[str, Any]:
        """Dense and effective operations."""
        per_layer = self._dense(compressed.module)
        effective = sum(
            flops * _weight_density(compressed.module.get_submodule(name))
            for name, flops in per_layer.items()
        )
        return {"value": float(effective), "dense": sum(per_layer.values())}

    def _dense(self, module: nn.Module) -> dict[str, int]:
        """Operations by module, each counted where it happens and not again in its parents."""
        inputs = example_of(module, self.example, self.name)
        meta = _detached(module).to("meta").eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            meta(*(i.to("meta") if isinstance(i, torch.Tensor) else i for i in inputs))
        prefix = type(meta).__name__
        totals = {
            name.removeprefix(prefix).removeprefix("."): sum(counts.values())
            for name, counts in counter.get_flop_counts().items()
            if name == prefix or name.startswith(f"{prefix}.")
        }
        own = dict(totals)
        for name, flops in totals.items():
            if name:
                parent = name.rpartition(".")[0]
                while parent not in totals:
                    parent = parent.rpartition(".")[0]
                own[parent] -= flops
        return own


def _detached(module: nn.Module) -> nn.Module:
    """A deep copy without the Trainer, which a LightningModule keeps a reference to."""
    trainer = getattr(module, "_trainer", None)
    memo = {} if trainer is None else {id(trainer): None}
    copy: nn.Module = deepcopy(module, memo)
    return copy


def _weight_density(module: nn.Module) -> float:
    """Share of non-zeros in the module's own weights of two or more dimensions; 1 without."""
    weights = [p for p in module.parameters(recurse=False) if p.dim() > 1]
    elements = sum(w.numel() for w in weights)
    return sum(int(torch.count_nonzero(w)) for w in weights) / elements if elements else 1.0
