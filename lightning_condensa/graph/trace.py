"""From a module and an example input to its channel graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from lightning_condensa.graph.builder import GraphBuilder
from lightning_condensa.graph.channels import ChannelGraph
from lightning_condensa.graph.flows import Call, Layers, Named, Rule, constants, flat, unknown
from lightning_condensa.graph.layers import LAYER_RULES
from lightning_condensa.graph.mixing import MIXING_RULES
from lightning_condensa.graph.movement import MOVEMENT_RULES
from lightning_condensa.graph.pointwise import POINTWISE_RULES, pointwise
from lightning_condensa.graph.recurrent import RECURRENT_RULES, STATE_RULES

_RULES: Mapping[str, Rule] = {
    **LAYER_RULES,
    **MOVEMENT_RULES,
    **MIXING_RULES,
    **POINTWISE_RULES,
    **RECURRENT_RULES,
}
#: Operators that compute a graph of their own.
_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
#: Assertions that an export leaves behind.
_CHECKS = ("_assert_scalar", "_assert_tensor_metadata", "_assert_async", "sym_constrain_range")


class TraceError(ValueError):
    """The forward pass of a module cannot be followed."""


def trace(module: nn.Module, example: Any) -> ChannelGraph:
    """Follow the channels of a module through its forward pass.

    The module runs once in evaluation mode, on tensors without values; it is left as it is.

    Args:
        module: Any module whose forward pass takes the same way for every input.
        example: Its input in Lightning's ``example_input_array`` convention: a tensor, a tuple of
            positional arguments, or a dictionary of keyword arguments.

    Raises:
        TraceError: If the forward pass fails on the example, or depends on values.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
        >>> graph = trace(net, torch.zeros(1, 3, 8, 8))
        >>> [norm.weight for norm in graph.norms]
        ['1.weight']
    """
    args, kwargs = example_arguments(example)
    moved = pytree.tree_map_only(Tensor, _placer(module), (args, kwargs))
    try:
        with evaluating(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to authors of exports
            program = torch.export.export(module, *moved, strict=False)
    except Exception as error:  # whatever the user's code, or the tracer, may raise
        first = str(error).strip().splitlines() or [""]
        raise TraceError(
            f"the forward pass of {type(module).__name__} cannot be traced on the example input "
            f"(it must run on it, and take the same way for every input): "
            f"{type(error).__name__}: {first[0]}"
        ) from error
    return _walk(program, module)


def trace_example(module: nn.Module) -> ChannelGraph:
    """Follow the channels of a module on its own ``example_input_array``.

    Raises:
        TraceError: If it has none or is sharded, and as for :func:`trace`.
    """
    example = getattr(module, "example_input_array", None)
    kind = type(module).__name__
    if example is None:
        raise TraceError(f"set {kind}.example_input_array, an input to follow the channels on")
    if any(isinstance(p, DTensor) for p in module.parameters()):
        raise TraceError(f"{kind} has sharded parameters, through which no channel is followed")
    return trace(module, example)


def example_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of an example input.

    Example:
        >>> example_arguments({"x": 1})
        ((), {'x': 1})
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def _placer(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Brings inputs to the device of a module, and numbers to its type if it has but one."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    types = {p.dtype for p in module.parameters() if p.is_floating_point()}
    dtype = types.pop() if len(types) == 1 else None

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return place


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every part has its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:  # a frozen part keeps its own mode
            part.training = training


def _walk(program: torch.export.ExportedProgram, module: nn.Module) -> ChannelGraph:
    builder = GraphBuilder()
    program.graph_module.graph.eliminate_dead_code()
    outputs = _follow(program.graph_module, _inputs(program, module), builder)
    for output in flat(pytree.tree_leaves(outputs)):
        if isinstance(output, Tensor):
            builder.pin(output, "an output of the network")
    return builder.finish()


def _follow(owner: GraphModule, values: dict[Node, Any], builder: GraphBuilder) -> Any:
    """What a graph gives.

    Args:
        owner: Holds the graph, and the bodies of its regions.
        values: Flows of placeholders, as far as they are known.
        builder: Takes up channels, ties and pins.
    """
    for node in owner.graph.nodes:
        if node.op == "placeholder":
            values.setdefault(node, constants(node.meta.get("val")))
        elif node.op == "get_attr":
            found = getattr(owner, str(node.target), None)
            region = isinstance(found, GraphModule)
            values[node] = found if region else constants(node.meta.get("val"))
        elif node.op == "output":
            return map_arg(node.args[0], lambda n: values[n])
        else:
            args, kwargs = (map_arg(a, lambda n: values[n]) for a in (node.args, node.kwargs))
            call = Call(builder, node, args, list(kwargs.values()))
            values[node] = None if call.name in _CHECKS else _rule(call)(call)
    return None


def _region(call: Call) -> Any:
    """The part of a forward pass under ``torch.autocast``, ``torch.no_grad`` and the like."""
    at = next(i for i, value in enumerate(call.args) if isinstance(value, GraphModule))
    body = call.args[at]
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    return _follow(body, dict(zip(inputs, call.args[at + 1 :], strict=True)), call.builder)


def _rule(call: Call) -> Rule:
    if call.name in _REGIONS:
        return _region
    if call.args and isinstance(call.args[0], Layers):
        return STATE_RULES.get(call.name, unknown)
    rule = _RULES.get(call.name) or _RULES.get(call.name.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in getattr(call.node.target, "tags", ()):
        rule = pointwise
    if rule is None or any(isinstance(v, Node) for v in call.node.kwargs.values()):
        return unknown
    return rule


def _inputs(program: torch.export.ExportedProgram, module: nn.Module) -> dict[Node, Any]:
    """Parameters and buffers among the inputs of a graph; tied ones under their first name."""
    named = [*module.named_parameters(), *module.named_buffers()]
    first = {id(tensor): name for name, tensor in reversed(named)}
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values: dict[Node, Any] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
            owner, _, attribute = spec.target.rpartition(".")
            tensor = getattr(module.get_submodule(owner), attribute)
            values[nodes[spec.arg.name]] = Named(first[id(tensor)], tensor.shape)
    return values
