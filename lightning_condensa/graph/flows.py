"""Following channels through a network: what rules for operators are made of.

An activation is followed as its *flow*: an integer tensor of the activation's own shape that holds
the channel of each element. Operators that only move elements about are run on the flow as they
are; the others have a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lightning_condensa.graph.builder import GraphBuilder, Where, compact, varying
from lightning_condensa.graph.channels import FIXED
from lightning_condensa.graph.definitions import Elementwise


@dataclass(frozen=True)
class Named:
    """A parameter or buffer.

    Attributes:
        name: Its name.
        shape: Its shape.
    """

    name: str
    shape: torch.Size


@dataclass(frozen=True, eq=False)
class Layers:
    """One flow for each layer, stacked along a dimension before the first of each.

    Attributes:
        flows: The flows; their channels differ, but as many have to be left of each.
    """

    flows: tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """A call of an operator in an exported graph.

    Attributes:
        builder: Takes up channels, ties and pins.
        node: The call.
        args: Its positional arguments, with flows in the place of activations.
        keywords: Values of its other arguments, likewise.
    """

    builder: GraphBuilder
    node: Node
    args: Sequence[Any]
    keywords: Sequence[Any] = ()

    @property
    def name(self) -> str:
        """The operator's name without namespace and overload."""
        schema = getattr(self.node.target, "_schema", None)
        name: str = getattr(self.node.target, "__name__", "") if schema is None else schema.name
        return name.split("::")[-1]

    @property
    def shape(self) -> torch.Size:
        """The shape of the result."""
        shape: torch.Size = self.node.meta["val"].shape
        return shape

    @property
    def where(self) -> Where:
        """Who calls it."""
        stack = self.node.meta.get("nn_module_stack") or {"": ("", "")}
        path, layer = list(stack.values())[-1]
        name = layer if isinstance(layer, str) else layer.__name__
        return Where(self.name, path, name.rpartition(".")[2])

    def arg(self, index: int, default: Any = None) -> Any:
        """A positional argument, or its default where it was not given."""
        return self.args[index] if len(self.args) > index else default

    def flow(self, index: int = 0) -> Tensor:
        """The flow of an argument; of a parameter or buffer each element is a channel."""
        return flow_of(self.builder, self.args[index])


Rule = Callable[[Call], Any]


def flow_of(builder: GraphBuilder, value: Any) -> Tensor:
    """The flow of an argument; of a parameter or buffer each element is a channel."""
    flow: Tensor = builder.values(value.name, value.shape) if isinstance(value, Named) else value
    return flow


def spread(channels: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """The flow of ``shape`` with the given channels along a dimension."""
    view = [1] * len(shape)
    view[dim] = -1
    return channels.view(view).expand(shape)


def fixed(shape: Sequence[int]) -> Tensor:
    """The flow of a constant."""
    return torch.full((), FIXED).expand(tuple(shape))


def merged(call: Call, flow: Tensor, dim: int) -> Tensor:
    """The channels along a dimension, where an operator treats all other positions alike.

    Channels that have the same index at other positions (tokens that were joined, say) are tied.

    Returns:
        Shape ``(flow.shape[dim],)``.
    """
    few = compact(flow).movedim(dim, 0)
    few = few.reshape(len(few), -1)
    if few.shape[1] > 1:
        few = torch.unique(few, dim=1)
    if few.shape[1] == 1:
        return few[:, 0].expand(flow.shape[dim])
    if bool((few == few[:1]).all()):  # channels lie along another dimension
        call.builder.pin(few, f"mixed with other positions by {call.name}")
        return fixed((flow.shape[dim],))
    outputs = call.builder.new(len(few))
    call.builder.define(Elementwise(outputs, few.t(), "all"))
    call.builder.tie(few, outputs[:, None])
    return outputs


def unknown(call: Call) -> Any:
    """Pin all that an operator touches."""
    for value in flat([*call.args, *call.keywords]):
        if isinstance(value, Named):
            call.builder.fix(value.name, value.shape)
        elif isinstance(value, Tensor):
            call.builder.pin(value, f"used by {call.name}, through which no channel is followed")
    return constants(call.node.meta.get("val"))


def constants(value: Any) -> Any:
    """The flow of constants in the structure of a value."""
    if isinstance(value, list | tuple):
        return [constants(v) for v in value]
    return fixed(value.shape) if isinstance(value, Tensor) else value


def flat(values: Any) -> Iterator[Any]:
    """The leaves of nested lists."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from flat(value)
        elif isinstance(value, Layers):
            yield from value.flows
        else:
            yield value


def varies(flow: Tensor, dims: Sequence[int]) -> bool:
    """Whether channels differ along one of some dimensions."""
    return not {d % flow.dim() for d in dims}.isdisjoint(varying(flow))
