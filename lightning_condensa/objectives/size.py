"""Objectives that are counted: bytes, parameters, FLOPs."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.deploy.flops import count_flops
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

    Counted as :func:`~lightning_condensa.deploy.flops.count_flops` does. This is what an execution
    that skips zeros has to do; a dense engine does more. A weight that is a sum or product counts
    as many operations as its parts have non-zeros, at most as many as a dense one.

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
        parts = {n: e.density for n, e in compressed.theta.items() if len(e.leaves) > 1}
        counts = count_flops(module, inputs, parts).values()
        return {"value": sum(c.effective for c in counts), "dense": sum(c.dense for c in counts)}
