"""Layers that the bundled kernel computes, alone or several in a row."""

from __future__ import annotations

import ctypes
import math
from copy import copy
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lightning_condensa.deploy.sparse.compiler import load_library
from lightning_condensa.deploy.sparse.geometry import Geometry, Window
from lightning_condensa.deploy.sparse.layers import DenseLayer, Epilogue, SparseLayer

#: Buffers begin at whole cache lines: so many floats.
_LINE = 16


class _Layer(ctypes.Structure):
    """``layer`` of ``kernel.c``, field by field."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("totals", "starts", "offset", "weight", "bias")),
        ("geometry", ctypes.POINTER(Geometry)),
        *((name, ctypes.c_int64) for name in ("samples", "blocks", "alone")),
    ]


@dataclass(frozen=True)
class _Plan:
    """All that depends on the shape of the input.

    Attributes:
        inputs: That shape.
        outputs: Shape of the result.
        scratch: Floats of working memory.
        between: Floats of the largest tensor between two layers.
        layers: What the kernel reads.
        tensors: What it points at.
    """

    inputs: torch.Size
    outputs: tuple[int, ...]
    scratch: int
    between: int
    layers: ctypes.Array[_Layer]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Weights:
    """What a layer holds: its non-zero weights, row by row.

    Attributes:
        window: How it moves over its input; ``None`` for a linear layer.
        epilogue: What follows.
        counts: Weights of each row.
        columns: Where they stand in it.
        values: The weights.
        bias: Of each row.
        alone: Whether one thread works it off.
    """

    window: Window | None
    epilogue: Epilogue
    counts: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor
    alone: bool

    @classmethod
    def of(cls, dense: DenseLayer, alone: bool) -> _Weights:
        """Those of a layer."""
        layer = dense.layer
        weight = layer.weight.detach().flatten(1)
        filled = weight != 0
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
        return cls(
            Window.of(layer) if isinstance(layer, nn.Conv2d) else None,
            dense.epilogue,
            filled.sum(1),
            filled.nonzero()[:, 1].int(),
            weight[filled],
            bias,
            alone,
        )

    def outputs(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the result."""
        if self.window is None:
            return inputs[0], len(self.bias)
        pooled = (n // self.epilogue.pool for n in self.window.outputs(inputs[2], inputs[3]))
        return (inputs[0], len(self.bias), *pooled)

    def plan(self, inputs: tuple[int, ...]) -> tuple[_Layer, int, tuple[Tensor, ...]]:
        """What the kernel reads, floats of working memory, and what must stay as it is."""
        library, window, filters = load_library(), self.window or Window(), len(self.bias)
        shape = inputs if self.window else (*inputs, 1, 1)
        relu, pool = self.epilogue.relu, self.epilogue.pool
        geometry = Geometry.of(window, (1, *shape[1:]), filters, relu=relu, pool=pool)
        group = library.sparse_group(ctypes.byref(geometry), shape[0])
        geometry = Geometry.of(window, (group, *shape[1:]), filters, relu=relu, pool=pool)
        columns = self.columns.long()
        block = library.sparse_block(ctypes.byref(geometry), len(columns))
        blocks = -(-shape[1] // block)
        filter_of = torch.repeat_interleave(self.counts)
        visit = columns // (window.size[0] * window.size[1] * block) * filters + filter_of
        order = visit.argsort(stable=True)
        tensors = (
            _starts(self.counts),
            _starts(visit.bincount(minlength=blocks * filters)),
            geometry.offsets(window, columns[order]),
            self.values[order],
            self.bias,
        )
        addresses = (t.data_ptr() for t in tensors)
        layer = _Layer(*addresses, ctypes.pointer(geometry), shape[0], blocks, self.alone)
        return layer, library.sparse_scratch(ctypes.byref(geometry)), tensors


class DirectLayer(SparseLayer):
    """A layer as a sum of shifted inputs, one for each non-zero weight (``kernel.c``).

    Args:
        dense: What it stands for.
        alone: Whether one thread works it off; else it runs in as many as torch has when it is
            called.

    Raises:
        KernelUnavailableError: If the kernel can't be compiled here.
    """

    def __init__(self, dense: DenseLayer, *, alone: bool = False) -> None:
        super().__init__(dense)
        load_library()
        self._layers: tuple[_Weights, ...] = (_Weights.of(dense, alone),)
        self._plan: _Plan | None = None

    def then(self, following: DirectLayer) -> DirectLayer:
        """Both in one call: layers cost microseconds, each step through Python about twenty.

        Args:
            following: Takes the outputs of this one, of as many dimensions.
        """
        both = copy(self)
        both._layers = (*self._layers, *following._layers)
        both.layer_name = f"{self.layer_name}, {self.epilogue}, {following.layer_name}"
        both.epilogue = following.epilogue
        return both

    def shared(self) -> DirectLayer:
        """The same in all threads; itself if it is so."""
        if not any(w.alone for w in self._layers):
            return self
        other = copy(self)
        other._layers = tuple(replace(w, alone=False) for w in self._layers)
        return other

    def _product(self, x: Tensor) -> Tensor:
        if len(x) == 0:
            return x.new_zeros(self._shapes(x.shape)[-1])
        plan = self._plan
        if plan is None or plan.inputs != x.shape:
            plan = self._plan = self._plan_for(x.shape)
        x = x.contiguous()
        y = torch.empty(plan.outputs)
        memory = torch.empty(plan.scratch + 2 * plan.between)
        load_library().sparse_run(
            *(x.data_ptr(), y.data_ptr(), memory.data_ptr(), plan.scratch, plan.between),
            *(plan.layers, len(plan.layers), torch.get_num_threads()),
        )
        return y

    def _plan_for(self, inputs: torch.Size) -> _Plan:
        shapes = self._shapes(inputs)
        planned = [w.plan(shape) for w, shape in zip(self._layers, shapes, strict=False)]
        layers, scratch, tensors = zip(*planned, strict=True)
        return _Plan(
            inputs,
            shapes[-1],
            _whole_lines(max(scratch)),
            _whole_lines(max(map(math.prod, shapes[1:-1]), default=0)),
            (_Layer * len(layers))(*layers),
            tuple(t for kept in tensors for t in kept),
        )

    def _shapes(self, inputs: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Of the input, and after each layer."""
        return reduce(lambda shapes, w: [*shapes, w.outputs(shapes[-1])], self._layers, [inputs])

    def __getstate__(self) -> dict[str, Any]:
        """Copies make their own plan: this one holds addresses."""
        return {**self.__dict__, "_plan": None}


def _starts(counts: Tensor) -> Tensor:
    """Where each group begins, and where the last one ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _whole_lines(floats: int) -> int:
    return -(-floats // _LINE) * _LINE
