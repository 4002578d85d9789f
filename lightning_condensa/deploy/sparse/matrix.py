"""Layers that torch computes with sparse matrices: CSR, and BSR for blocks of weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_condensa.deploy.sparse.geometry import Window
from lightning_condensa.deploy.sparse.layers import DenseLayer, SparseLayer

_SIDES = (32, 16, 8, 4)
_LEAST_FILL = 0.75


class MatrixLayer(SparseLayer):
    """A layer as the product of a sparse matrix and the columns of its input.

    Args:
        dense: What it stands for.
        block: Side of the square blocks of a BSR matrix; ``None`` for CSR.
    """

    def __init__(self, dense: DenseLayer, block: int | None = None) -> None:
        super().__init__(dense)
        layer = dense.layer
        self._window = Window.of(layer) if isinstance(layer, nn.Conv2d) else None
        weight = layer.weight.detach().flatten(1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta")
            self._matrix = (
                weight.to_sparse_csr() if block is None else weight.to_sparse_bsr((block, block))
            )
        self._bias = None if layer.bias is None else layer.bias.detach().clone().unsqueeze(1)

    def _product(self, x: Tensor) -> Tensor:
        if self._window is None:
            return self.epilogue(self._times(x.t()).t()).contiguous()
        outputs = self._window.outputs(x.shape[2], x.shape[3])
        columns = _unfold(x, self._window).transpose(0, 1).flatten(1)
        y = self._times(columns).view(self._matrix.shape[0], len(x), *outputs).transpose(0, 1)
        return self.epilogue(y).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        """The matrix by its parts: torch can't copy the whole."""
        matrix = self._matrix
        parts = (matrix.crow_indices(), matrix.col_indices(), matrix.values())
        return {**self.__dict__, "_matrix": (*parts, matrix.shape, matrix.dtype, matrix.layout)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows, columns, values, size, dtype, layout = state["_matrix"]
        matrix = torch.sparse_compressed_tensor(
            rows, columns, values, size, dtype=dtype, layout=layout, check_invariants=False
        )
        super().__setstate__({**state, "_matrix": matrix})  # type: ignore[no-untyped-call]

    def _times(self, columns: Tensor) -> Tensor:
        y = self._matrix @ columns
        return y if self._bias is None else y.add_(self._bias)


def block_side(weight: Tensor) -> int | None:
    """The largest side of square blocks in which the non-zero weights stand, if they stand so.

    Args:
        weight: Of any shape; all dimensions but the first count as columns.

    Returns:
        A side that divides rows and columns, such that in blocks that are not empty at least three
        quarters of all weights are not zero; ``None`` if there is none.

    Example:
        >>> import torch
        >>> block_side(torch.block_diag(torch.ones(8, 8), torch.ones(8, 8)))
        8
    """
    filled = weight.flatten(1) != 0
    rows, columns = filled.shape
    for side in _SIDES:
        if rows % side == 0 and columns % side == 0:
            blocks = filled.view(rows // side, side, columns // side, side).any(3).any(1)
            if filled.sum() >= _LEAST_FILL * side * side * blocks.sum() > 0:
                return side
    return None


def _unfold(x: Tensor, window: Window) -> Tensor:
    """Columns of shape (samples, weights of a filter, outputs)."""
    if window == Window():
        return x.flatten(2)
    (top, left), (bottom, right) = window.before, window.after
    padded = functional.pad(x, (left, right, top, bottom))
    return functional.unfold(padded, window.size, window.dilation, 0, window.stride)
