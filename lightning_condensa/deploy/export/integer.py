"""Layers whose weights are integer codes: found in the graph, batch norm folded into their scales.

With batch norm behind a layer, ``γ (c·s·x + b − μ) / σ + β``, the codes of an output channel become
``c · sign(γ/σ)``, its scale ``s · |γ/σ|`` and its bias ``(b − μ) γ/σ + β``: no code is rounded
again. Where γ is zero so is the scale, until :mod:`.qdq` finds one for the bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch

from lightning_condensa.deploy.export.graph import (
    OnnxGraph,
    attribute,
    constant_of,
    only_user,
    users,
)
from lightning_condensa.schemes import Encoded


class StaysFloatError(Exception):
    """A weight cannot be computed with in int8; the message says why."""


@dataclass(frozen=True)
class IntegerLayer:
    """A node of the graph with integer weights.

    Attributes:
        node: ``Conv``, ``Gemm`` or ``MatMul``.
        weight: Name of the parameter.
        codes: int8, laid out as the node wants them.
        scale: float32, one number for each output channel; negative only beside the code −128.
        axis: The dimension of output channels in ``codes``.
        bias: float32, or ``None``.
        norm: The batch norm behind it, which is in its numbers, or ``None``.
    """

    node: ir.Node
    weight: str
    codes: np.ndarray
    scale: np.ndarray
    axis: int
    bias: np.ndarray | None
    norm: ir.Node | None = None

    @property
    def input_name(self) -> str:
        """Name of the activations that it reads."""
        value = self.node.inputs[0]
        assert value is not None and value.name is not None
        return value.name

    @property
    def broadcast_scale(self) -> np.ndarray:
        """The scale, so that it broadcasts against the codes."""
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return self.scale.reshape(shape)


def integer_layers(graph: OnnxGraph, name: str, encoded: Encoded) -> list[IntegerLayer]:
    """The nodes that compute with an open weight; the graph is not changed.

    Args:
        graph: The graph.
        name: The weight, which is open.
        encoded: Its θ, on the CPU.

    Returns:
        A layer for each use of the weight: a module may be called twice.

    Raises:
        StaysFloatError: If one of them cannot be computed with in int8.
    """
    for node, _ in users(graph.open[name]):
        if node.op_type not in {"Conv", "Gemm", "MatMul", "Transpose"}:
            raise StaysFloatError(f"used by {node.op_type}")
    codes, scale = channel_codes(encoded)
    layers = []
    for node, index in users(graph.open[name]):
        if node.op_type == "Transpose":
            if codes.ndim != 2:
                raise StaysFloatError("its transpose is used")
            for user, position in users(node.outputs[0]):
                layers.append(_layer(user, position, name, codes.T, scale, axis=1))
        else:
            layers.append(_layer(node, index, name, codes, scale, axis=0))
    return layers


def has_integer_codes(encoded: Encoded) -> bool:
    """Whether θ is int8 codes under a scale."""
    return encoded.scale is not None and encoded.codes.dtype == torch.int8


def channel_codes(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Codes as int8, and a scale for each output channel.

    Raises:
        StaysFloatError: If θ is not of that form.

    Example:
        >>> codes = torch.tensor([[1, -2], [3, 0]], dtype=torch.int8)
        >>> scale = torch.tensor([[0.5], [-0.25]])
        >>> codes, scale = channel_codes(Encoded(codes, torch.float32, scale))
        >>> codes.tolist(), scale.tolist()
        ([[1, -2], [-3, 0]], [0.5, 0.25])
    """
    if encoded.scale is None or not has_integer_codes(encoded):
        raise StaysFloatError("not integer codes")
    if encoded.dtype != torch.float32:
        raise StaysFloatError(f"its type is {encoded.dtype}, not float32")
    channels = encoded.codes.shape[0]
    wanted = (channels, *[1] * (encoded.codes.dim() - 1))
    if encoded.scale.numel() != 1 and tuple(encoded.scale.shape) != wanted:
        raise StaysFloatError("its scales are not by output channel or tensor")
    scale = encoded.scale.reshape(-1).expand(channels).numpy()
    return positive(encoded.codes.numpy(), scale, axis=0)


def write_float(graph: OnnxGraph, layer: IntegerLayer, position: int) -> None:
    """Give a layer its weight as floats, and its bias; batch norm behind it goes.

    Args:
        graph: The graph.
        layer: The layer.
        position: Which use of the weight it is.
    """
    node = layer.node
    name = layer.weight if position == 0 else f"{layer.weight}/{position}"
    weight = graph.constant(f"{name}/float", layer.codes * layer.broadcast_scale)
    node.replace_input_with(1, weight)
    if layer.bias is not None:
        node.resize_inputs(3)
        node.replace_input_with(2, graph.constant(f"{name}/float_bias", layer.bias))
    if layer.norm is not None:
        graph.skip(layer.norm)


def _layer(
    node: ir.Node, index: int, name: str, codes: np.ndarray, scale: np.ndarray, axis: int
) -> IntegerLayer:
    kind = node.op_type
    plain = (
        (kind == "Conv" and axis == 0)
        or (kind == "MatMul" and axis == 1)
        or (
            kind == "Gemm"
            and attribute(node, "transB", 0) == 1 - axis
            and attribute(node, "transA", 0) == 0
            and attribute(node, "alpha", 1) == attribute(node, "beta", 1) == 1
        )
    )
    if index != 1 or not plain:
        raise StaysFloatError(f"used by {kind}")
    bias = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = constant_of(node.inputs[2])
        if bias is None or bias.shape != scale.shape:
            raise StaysFloatError("its bias is no constant of a number for each channel")
    layer = IntegerLayer(node, name, codes, scale, axis, bias)
    norm = only_user(node.outputs[0]) if kind != "MatMul" else None
    if norm is None or norm.op_type != "BatchNormalization":
        return layer
    return _folded(layer, norm)


def _folded(layer: IntegerLayer, norm: ir.Node) -> IntegerLayer:
    """The layer with batch norm in its codes, scales and bias."""
    constants = [constant_of(value) for value in norm.inputs[1:5]]
    if any(c is None for c in constants) or attribute(norm, "training_mode", 0):
        raise StaysFloatError("the batch norm behind it is not constant")
    gamma, beta, mean, variance = (c.astype(np.float64) for c in constants if c is not None)
    factor = gamma / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    bias = beta + ((0 if layer.bias is None else layer.bias) - mean) * factor
    scale = (layer.scale * factor).astype(np.float32)
    codes, scale = positive(layer.codes, scale, layer.axis)
    return replace(layer, codes=codes, scale=scale, bias=bias.astype(np.float32), norm=norm)


def positive(codes: np.ndarray, scale: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The same weights with positive scales, wherever the codes allow it.

    A channel with the code −128, whose negative int8 cannot hold, keeps a negative scale.

    Example:
        >>> codes = np.array([[1, -2], [-128, 0]], np.int8)
        >>> codes, scale = positive(codes, np.float32([-0.5, -0.25]), axis=0)
        >>> codes.tolist(), scale.tolist()
        ([[-1, 2], [-128, 0]], [0.5, -0.25])
    """
    others = tuple(d for d in range(codes.ndim) if d != axis)
    turned = (scale < 0) & (codes.min(others, initial=0) > -128)
    shape = [1] * codes.ndim
    shape[axis] = -1
    turn = turned.reshape(shape)
    return np.where(turn, -codes, codes), np.where(turned, -scale, scale)
