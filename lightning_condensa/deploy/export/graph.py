"""From a traced program to an ONNX graph in which compressed weights can still be told."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor
from torch.export import ExportedProgram

from lightning_condensa.deploy.export.quiet import quiet_export

#: The first with 4-bit types, and QuantizeLinear for all that is needed here.
OPSET = 21


class OnnxGraph:
    """An ONNX graph, and what is needed to edit it.

    Weights that are to be stored in another form are *open* at first: inputs of the graph without
    a value, so that the optimizer's constant folding leaves them, and their names, alone.

    Args:
        program: The traced program.
        names: Names of the weights to keep open; those that forward does not use are not there.

    Attributes:
        model: The model.
        open: The open weights by name.
    """

    def __init__(self, program: ExportedProgram, names: Collection[str]) -> None:
        with quiet_export():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                external_data=False,
                optimize=False,
                opset_version=OPSET,
                verbose=False,
            )
        assert exported is not None
        self.open: dict[str, ir.Value] = {}
        graph = exported.model.graph
        for name in names:
            if name in graph.initializers:
                value = graph.initializers.pop(name)
                value.const_value = None
                graph.inputs.append(value)
                self.open[name] = value
        exported.optimize()
        self.model = exported.model
        values = {value.name: value for value in self.model.graph.inputs}
        self.open = {name: values[name] for name in self.open}
        self._strip()

    @property
    def graph(self) -> ir.Graph:
        """The graph."""
        return self.model.graph

    def constant(self, name: str, value: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """A new constant. A slash in its name keeps it apart from those of the exporter."""
        tensor = ir.tensor(value, name=name) if isinstance(value, np.ndarray) else value
        added = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.initializers.add(added)
        return added

    def close(self, name: str, value: Tensor) -> None:
        """Give an open weight its values."""
        weight = self._take(name)
        weight.const_value = TorchTensor(value, name)
        self.graph.initializers.add(weight)

    def compute(self, name: str, nodes: Sequence[ir.Node]) -> None:
        """Let the last of some nodes give an open weight; it gets the weight's name."""
        weight, result = self._take(name), nodes[-1].outputs[0]
        weight.name, result.name = f"{name}.open", name
        result.shape, result.type = weight.shape, weight.type
        weight.replace_all_uses_with(result)
        self.graph.insert_before(self.graph[0], nodes)

    def drop(self, name: str) -> None:
        """Forget an open weight that nothing uses any more, and the nodes that were only for it."""
        for node, _ in list(self.open[name].uses()):
            assert not any(list(output.uses()) for output in node.outputs)
            self.graph.remove(node, safe=True)
        self._take(name)

    def skip(self, node: ir.Node) -> None:
        """Remove a node: its first input takes the place, and the name, of its first output."""
        given, taken = node.outputs[0], node.inputs[0]
        assert taken is not None
        given.name, taken.name = taken.name, given.name
        given.replace_all_uses_with(taken, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def serialize(self, extra_outputs: Sequence[ir.Value] = ()) -> bytes:
        """The file, without constants that nothing reads.

        Args:
            extra_outputs: Values to be given beside the outputs.
        """
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]
        proto = ir.to_proto(self.model)
        proto.graph.output.extend(ir.to_proto(value) for value in extra_outputs)
        data: bytes = proto.SerializeToString(deterministic=True)
        return data

    def _take(self, name: str) -> ir.Value:
        value = self.open.pop(name)
        self.graph.inputs.remove(value)
        return value

    def _strip(self) -> None:
        """Remove the exporter's notes: stack traces with paths of this machine, mostly."""
        self.graph.metadata_props.clear()
        for node in self.graph:
            node.metadata_props.clear()
            for output in node.outputs:
                output.metadata_props.clear()
        for value in [*self.graph.inputs, *self.graph.initializers.values()]:
            value.metadata_props.clear()


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The values of a constant, ``None`` for anything that is computed or left open."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def users(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that read a value, and as which input."""
    for use in value.uses():
        yield use.node, use.idx


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value which is no output of the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def attribute(node: ir.Node, name: str, default: float) -> float:
    """A number among the attributes of a node."""
    found: Mapping[str, ir.Attr] = node.attributes
    return float(found[name].value) if name in found else default
