"""Weights of few values in ONNX: a table and narrow indices instead of floats."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from lightning_condensa.deploy.export.graph import OnnxGraph
from lightning_condensa.schemes import Encoded

_NIBBLE, _BYTE = 16, 256


def is_codebook(encoded: Encoded) -> bool:
    """Whether an encoding is that of :class:`~lightning_condensa.Codebook`.

    Example:
        >>> from lightning_condensa import Codebook
        >>> layer = torch.nn.Linear(8, 8)
        >>> theta = Codebook(4).bind(layer).pi(dict(layer.named_parameters()))
        >>> is_codebook(theta["weight"]), is_codebook(Encoded.dense(layer.weight))
        (True, False)
    """
    return encoded.scale is None and encoded.bits is not None and encoded.bits <= 8


def store_codebook(graph: OnnxGraph, name: str, encoded: Encoded) -> int:
    """Let ``Gather(table, Cast(indices))`` give an open weight.

    Indices of up to 16 values take 4 bits each, others 8. Runtimes fold the two nodes when they
    load the file: it is as fast as a dense one.

    Args:
        graph: The graph.
        name: The weight.
        encoded: Its θ, on the CPU.

    Returns:
        Entries of the table. Zero takes one where the weight is pruned.
    """
    table, indices = torch.unique(encoded.decode(), return_inverse=True)
    if len(table) > _BYTE:  # the zero of pruned weights beside 256 others
        graph.close(name, encoded.decode())
        return 0
    codes = indices.numpy().astype(np.uint8)
    stored: ir.TensorProtocol = ir.tensor(codes, name=f"{name}/indices")
    if len(table) <= _NIBBLE:
        stored = ir.PackedTensor(
            _nibbles(codes), ir.DataType.UINT4, shape=codes.shape, name=f"{name}/indices"
        )
    cast = ir.node(
        "Cast", [graph.constant(f"{name}/indices", stored)], {"to": int(ir.DataType.INT32)}
    )
    entries = graph.constant(f"{name}/table", TorchTensor(table, f"{name}/table"))
    graph.compute(name, [cast, ir.node("Gather", [entries, cast.outputs[0]], {"axis": 0})])
    return len(table)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes to a byte, the first in the low half, as ONNX wants them."""
    flat = codes.reshape(-1)
    padded = np.zeros(len(flat) + len(flat) % 2, np.uint8)
    padded[: len(flat)] = flat
    return padded[0::2] | padded[1::2] << 4
