"""Layers that the bundled kernel computes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_condensa.deploy.sparse.compiler import load_library
from lightning_condensa.deploy.sparse.geometry import Geometry, Window
from lightning_condensa.deploy.sparse.layers import DenseLayer, SparseLayer


@dataclass(frozen=True)
class _Plan:
    """All that depends on the shape of the input.

    Attributes:
        inputs: That shape.
        outputs: Shape of the result.
        scratch: Floats of working memory.
        tensors: What the arguments point at.
        arguments: Of ``sparse_forward``, after the tensors that are new in every call.
    """

    inputs: torch.Size
    outputs: tuple[int, ...]
    scratch: int
    tensors: tuple[Tensor, ...]
    arguments: tuple[Any, ...]


class DirectLayer(SparseLayer):
    """A layer as a sum of shifted inputs, one for each non-zero weight (``kernel.c``).

    Args:
        dense: What it stands for.
        threads: That it runs in; as many as torch has when it is called where ``None``.

    Raises:
        KernelUnavailableError: If the kernel can't be compiled here.
    """

    def __init__(self, dense: DenseLayer, threads: int | None = None) -> None:
        super().__init__(dense)
        load_library()
        self._threads = threads
        layer = dense.layer
        self._window = Window.of(layer) if isinstance(layer, nn.Conv2d) else Window()
        weight = layer.weight.detach().flatten(1)
        filled = weight != 0
        self._counts = filled.sum(1)
        self._columns = filled.nonzero()[:, 1].int()
        self._values = weight[filled]
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
        self._bias = bias
        self._plan: _Plan | None = None

    def _product(self, x: Tensor) -> Tensor:
        if len(x) == 0:
            return x.new_zeros(self._outputs(x.shape))
        plan = self._plan
        if plan is None or plan.inputs != x.shape:
            plan = self._plan = self._plan_for(x.shape)
        x = x.contiguous()
        y = torch.empty(plan.outputs)
        scratch = torch.empty(plan.scratch)
        load_library().sparse_forward(
            *(x.data_ptr(), y.data_ptr(), scratch.data_ptr()),
            *plan.arguments,
            self._threads or torch.get_num_threads(),
        )
        return y

    def _plan_for(self, inputs: torch.Size) -> _Plan:
        library, window, filters = load_library(), self._window, len(self._bias)
        shape = tuple(inputs) if self._dims == 4 else (*inputs, 1, 1)
        relu, pool = self.epilogue.relu, self.epilogue.pool
        geometry = Geometry.of(window, (1, *shape[1:]), filters, relu=relu, pool=pool)
        group = library.sparse_group(ctypes.byref(geometry), shape[0])
        geometry = Geometry.of(window, (group, *shape[1:]), filters, relu=relu, pool=pool)
        columns = self._columns.long()
        block = library.sparse_block(ctypes.byref(geometry), len(columns))
        blocks = -(-shape[1] // block)
        filter_of = torch.repeat_interleave(self._counts)
        visit = columns // (window.size[0] * window.size[1] * block) * filters + filter_of
        order = visit.argsort(stable=True)
        tensors = (
            _starts(self._counts),
            _starts(visit.bincount(minlength=blocks * filters)),
            geometry.offsets(window, columns[order]),
            self._values[order],
            self._bias,
        )
        addresses = (t.data_ptr() for t in tensors)
        arguments = (*addresses, ctypes.pointer(geometry), shape[0], blocks)
        scratch = library.sparse_scratch(ctypes.byref(geometry))
        return _Plan(inputs, self._outputs(inputs), scratch, tensors, arguments)

    def _outputs(self, inputs: torch.Size) -> tuple[int, ...]:
        if self._dims == 2:
            return inputs[0], len(self._bias)
        pooled = (n // self.epilogue.pool for n in self._window.outputs(inputs[2], inputs[3]))
        return (inputs[0], len(self._bias), *pooled)

    def __getstate__(self) -> dict[str, Any]:
        """Copies make their own plan: this one holds addresses."""
        return {**self.__dict__, "_plan": None}


def _starts(counts: Tensor) -> Tensor:
    """Where each group begins, and where the last one ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
