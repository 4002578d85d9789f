"""Rules for recurrent layers: hidden units as channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lightning_condensa.graph.definitions import Definition, Origins, Reads, Removal
from lightning_condensa.graph.flows import Call, Layers, Named, Rule, merged, spread, unknown

#: Gates of an operator; the rows of the last but the output's make the new state.
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
#: By the number of gates: the one that is the new content of the state.
_CONTENT = {4: 2, 3: 2, 1: 0}


@dataclass(frozen=True, eq=False)
class Recurrent(Definition):
    """Hidden units of one layer and direction, which start as zeros.

    Attributes:
        inputs: The channel at each input.
        gates: Rows of each unit: 4 of an LSTM, 3 of a GRU, 1 of a plain recurrent layer.
        weights: Names of the weights of inputs and of hidden units.
        biases: Names of both biases, if there are some.
    """

    inputs: Tensor
    gates: int
    weights: tuple[str, str]
    biases: tuple[str, ...]

    def zeros(self, zero: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Units whose new content is always zero.

        A state that starts as zero and is only mixed with zeros stays zero, whatever the gates: of
        an LSTM ``c = σ(f)·0 + σ(i)·tanh(0)``, of a GRU ``h = (1−z)·tanh(0) + z·0``. Units may read
        each other as long as all of them are of the kind.
        """
        reads_input, reads_hidden = (
            self._used(tensors[n], _CONTENT[self.gates]) for n in self.weights
        )
        silent = ~(reads_input & ~zero[self.inputs]).any(1)
        for name in self.biases:
            silent &= tensors[name].view(self.gates, -1)[_CONTENT[self.gates]] == 0
        while True:
            fewer = silent & ~(reads_hidden & ~silent).any(1)
            if torch.equal(fewer, silent):
                return silent
            silent = fewer

    def reads(self, zero: Tensor, tensors: Mapping[str, Tensor]) -> list[Reads]:
        """What the gates of a unit read, of the input and of other units."""
        outputs = self.outputs[None]
        return [
            Reads(read[None], outputs, (self._used(tensors[name]) & ~zero[read])[None])
            for read, name in zip((self.inputs, self.outputs), self.weights, strict=True)
        ]

    def origins(self, origins: Sequence[Origins], removal: Removal) -> list[Origins]:
        """None: rows of several gates make a unit."""
        return [None] * len(self.outputs)

    def _used(self, weight: Tensor, gate: int | None = None) -> Tensor:
        """Which inputs each unit reads, in one of its gates or in any."""
        used = (weight != 0).view(self.gates, -1, weight.shape[1])
        return used.any(0) if gate is None else used[gate]


def _recurrent(call: Call) -> Any:
    """All layers and directions of one LSTM, GRU or plain recurrent layer."""
    if len(call.args) != 9 or not _starts_as_zero(call):  # packed sequences have one more
        return unknown(call)
    flow, _, parameters, has_biases, layers, *_, bidirectional, _ = call.args
    directions, kinds = 1 + bidirectional, 4 if has_biases else 2
    named = [p for p in parameters if isinstance(p, Named)]
    if len(named) != layers * directions * kinds or len(named) != len(parameters):
        return unknown(call)  # projected states among them
    builder, gates = call.builder, _GATES[call.name]
    inputs = merged(call, flow, -1)
    found: list[Tensor] = []
    for layer in range(layers):
        of_layer = []
        for direction in range(directions):
            start = (layer * directions + direction) * kinds
            weights = [p.name for p in named[start : start + kinds]]
            outputs = builder.new(named[start + 1].shape[1])
            rows = outputs.repeat(gates)
            builder.define(
                Recurrent(outputs, inputs, gates, (weights[0], weights[1]), tuple(weights[2:]))
            )
            for name in weights:
                builder.axis(name, 0, rows)
            builder.axis(weights[0], 1, inputs)
            builder.axis(weights[1], 1, outputs)
            of_layer.append(outputs)
        inputs = torch.cat(of_layer)
        found += of_layer
    builder.alike(found)  # one hidden_size holds for all
    results = call.node.meta["val"]
    states = Layers(tuple(spread(outputs, -1, results[1].shape[1:]) for outputs in found))
    return [spread(inputs, -1, results[0].shape), *[states] * (len(results) - 1)]


def _starts_as_zero(call: Call) -> bool:
    """Whether the first state is made of zeros by the layer itself, and so follows its size."""
    given = call.node.args[1]
    states = given if isinstance(given, list | tuple) else [given]
    return all(
        isinstance(state, Node)
        and state.target == torch.ops.aten.zeros.default
        and state.meta.get("nn_module_stack") == call.node.meta.get("nn_module_stack")
        for state in states
    )


def _layer_of(call: Call) -> Any:
    """The state of one layer and direction."""
    states, dim, index = call.args
    if dim % (states.flows[0].dim() + 1):
        return unknown(call)
    return states.flows[index]


RECURRENT_RULES: Mapping[str, Rule] = dict.fromkeys(_GATES, _recurrent)
#: Rules for what a recurrent layer says of its last states.
STATE_RULES: Mapping[str, Rule] = {"select": _layer_of}
