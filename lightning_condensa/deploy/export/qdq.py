"""Where an integer graph rounds activations, in the QuantizeLinear/DequantizeLinear form.

Runtimes replace ``DequantizeLinear → Conv → QuantizeLinear`` by one integer kernel. So what such a
layer reads is rounded to uint8, and what it gives where that pays: convolutions have no integer
kernel that gives floats, linear layers do, and stay more exact. Cheap layers between (pooling,
addition, reshaping) are kept in integers where something after them is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lightning_condensa.deploy.export.calibration import Activation
from lightning_condensa.deploy.export.graph import OnnxGraph, constant_of, only_user
from lightning_condensa.deploy.export.integer import IntegerLayer

#: These move values, and give them on the grid on which they get them.
_MOVES = {"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
#: These give other values.
_SUMS = {"Add", "AveragePool", "Concat", "GlobalAveragePool"}
#: Largest magnitude of the codes of a bias: the other half of int32 is for the sum of products.
_LARGEST_BIAS = 2**30
#: Where the weights of a channel add less than this share of its bias, float32 drops it too.
_SILENT = 2.0**-24
#: Steps of the bias of a channel without weights.
_BIAS_STEPS = 2**23


class Placement:
    """Which values of a graph are rounded to uint8.

    Args:
        graph: The graph, with float weights in it.
        layers: The layers to compute in integers.

    Attributes:
        kept: The nodes that compute in integers.
        values: The values, in the order in which they are computed.
    """

    def __init__(self, graph: OnnxGraph, layers: Sequence[IntegerLayer]) -> None:
        self._layers = {layer.node for layer in layers}
        self.kept = self._integer_nodes(graph)
        chosen: dict[ir.Value, None] = {}
        for node in graph.graph:
            if node in self.kept:
                chosen.update(dict.fromkeys(self._data(node)))
            if self._ends(node):
                chosen[node.outputs[0]] = None
        self.values = [value for value in chosen if not self._absorbed(value)]

    def follows(self, value: ir.Value) -> ir.Value | None:
        """The value on whose grid another one is, because it holds the same numbers."""
        node = value.producer()
        if node is not None and node.op_type in _MOVES and node in self.kept:
            return node.inputs[0]
        return None

    def _integer_nodes(self, graph: OnnxGraph) -> set[ir.Node]:
        candidates: dict[ir.Node, None] = {}
        for node in graph.graph:
            light = (node.op_type in _MOVES | _SUMS or _rectifies(node)) and all(
                value.producer() in candidates for value in self._data(node)
            )
            if node in self._layers or light:
                candidates[node] = None
        kept: set[ir.Node] = set()
        for node in reversed(candidates):
            read = any(use.node in kept for use in node.outputs[0].uses())
            if node in self._layers or read or self._rectifies_convolution(node):
                kept.add(node)
        return kept

    def _data(self, node: ir.Node) -> list[ir.Value]:
        """The activations that a node reads; shapes, axes, limits and weights are none."""
        read = node.inputs if node.op_type in ("Add", "Concat") else node.inputs[:1]
        return [value for value in read if value is not None]

    def _rectifies_convolution(self, node: ir.Node) -> bool:
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        return (
            _rectifies(node)
            and producer is not None
            and producer in self._layers
            and producer.op_type == "Conv"
        )

    def _ends(self, node: ir.Node) -> bool:
        """Whether what a node gives has to be rounded, whoever reads it."""
        if node in self._layers:
            return node.op_type == "Conv"
        return node in self.kept and self._rectifies_convolution(node)

    def _absorbed(self, value: ir.Value) -> bool:
        """Whether what a rectifier makes of it is rounded in its place."""
        user = only_user(value)
        return (
            value.producer() in self.kept
            and user is not None
            and _rectifies(user)
            and user in self.kept
        )


def grids(placement: Placement, measured: Mapping[str, Activation]) -> dict[str, Activation]:
    """The grid of each value: the measured one, or that of the value whose numbers it holds."""
    found: dict[str, Activation] = {}
    for value in placement.values:
        source = placement.follows(value)
        name = _name(value)
        found[name] = measured[name] if source is None else found[_name(source)]
    return found


def with_bias_steps(layer: IntegerLayer, grid: Activation) -> IntegerLayer | None:
    """The layer with scales on whose products with that of its input the bias is exact enough.

    Only channels whose weights add nothing get another scale, and zeros for codes.

    Args:
        layer: The layer.
        grid: The grid of its input.

    Returns:
        ``None`` where the bias of a channel is beyond int32.
    """
    axes = tuple(d for d in range(layer.codes.ndim) if d != layer.axis)
    largest = np.abs(layer.codes.astype(np.float64)).sum(axes)
    largest *= np.abs(layer.scale) * grid.amplitude
    bias = np.zeros_like(largest) if layer.bias is None else np.abs(layer.bias)
    silent = largest <= _SILENT * bias
    steps = np.where(bias > 0, bias / float(grid.scale) / _BIAS_STEPS, 1).astype(np.float32)
    scale = np.where(silent, np.maximum(steps, np.finfo(np.float32).tiny), layer.scale)
    if (bias / (np.abs(scale) * float(grid.scale)) > _LARGEST_BIAS).any():
        return None
    shape = [1] * layer.codes.ndim
    shape[layer.axis] = -1
    codes = np.where(silent.reshape(shape), 0, layer.codes).astype(np.int8)
    return replace(layer, codes=codes, scale=scale.astype(np.float32))


def write_activation(
    graph: OnnxGraph, placement: Placement, value: ir.Value, grid: Activation
) -> None:
    """Round a value for what computes in integers; for all that reads it, where that gives it."""
    name, producer = _name(value), value.producer()
    readers = [use for use in value.uses() if use.node in placement.kept]
    constants = [
        graph.constant(f"{name}/scale", np.asarray(grid.scale)),
        graph.constant(f"{name}/zero_point", np.asarray(grid.zero_point, np.uint8)),
    ]
    quantize = ir.node("QuantizeLinear", [value, *constants])
    restore = ir.node("DequantizeLinear", [quantize.outputs[0], *constants])
    quantized, restored = quantize.outputs[0], restore.outputs[0]
    quantized.name, restored.name = f"{name}/quantized", f"{name}/restored"
    restored.shape, restored.type = value.shape, value.type
    if producer in placement.kept:
        if value.is_graph_output():  # the name stays that of the output
            value.name, restored.name = f"{name}/float", name
        value.replace_all_uses_with(restored, replace_graph_outputs=True)
        quantize.replace_input_with(0, value)
    else:
        for use in readers:
            use.node.replace_input_with(use.idx, restored)
    if producer is None:
        graph.graph.insert_before(graph.graph[0], [quantize, restore])
    else:
        graph.graph.insert_after(producer, [quantize, restore])


def write_integer(graph: OnnxGraph, layer: IntegerLayer, grid: Activation) -> None:
    """Give a layer its weight as codes and its bias as int32, each with a scale."""
    weight = layer.node.inputs[1]
    assert weight is not None
    name = _name(weight).removesuffix("/float")
    zeros = np.zeros_like(layer.scale, np.int8)
    _dequantize(graph, layer, 1, name, (layer.codes, layer.scale, zeros), layer.axis)
    if layer.bias is not None:
        steps = layer.scale * grid.scale
        rounded = np.rint(layer.bias.astype(np.float64) / steps).astype(np.int32)
        bias = (rounded, steps, np.zeros_like(rounded))
        _dequantize(graph, layer, 2, f"{name}/bias", bias, 0)


def _dequantize(
    graph: OnnxGraph,
    layer: IntegerLayer,
    index: int,
    name: str,
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray],
    axis: int,
) -> None:
    """Let an input of a layer be dequantized from codes."""
    kinds = ("codes", "scale", "zero_point")
    constants = [graph.constant(f"{name}/{k}", a) for k, a in zip(kinds, arrays, strict=True)]
    node = ir.node("DequantizeLinear", constants, {"axis": axis})
    node.outputs[0].name = name
    layer.node.replace_input_with(index, node.outputs[0])
    graph.graph.insert_before(layer.node, [node])


def _rectifies(node: ir.Node) -> bool:
    """Whether a node clips at zero, which rounding to a grid from zero upwards does as well."""
    if node.op_type == "Clip" and len(node.inputs) > 1:
        lower = constant_of(node.inputs[1])
        return lower is not None and float(lower) == 0
    return node.op_type == "Relu"


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
