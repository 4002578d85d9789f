"""Rules for layers with parameters: products, normalizations, tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_condensa.graph.definitions import Norm, Product, Values
from lightning_condensa.graph.flows import Call, Named, Rule, fixed, merged, spread, unknown


def _linear(call: Call) -> Any:
    return _product(call, dim=-1)


def _convolution(call: Call) -> Any:
    dimensions = int(re.findall(r"\d", call.name)[0])
    return _product(call, -dimensions - 1, call.arg(6, 1), transposed="transpose" in call.name)


def _product(call: Call, dim: int, groups: int = 1, transposed: bool = False) -> Any:
    weight, bias = _name(call.arg(1)), _name(call.arg(2))
    if weight is None or (bias is None and call.arg(2) is not None):
        return unknown(call)
    builder = call.builder
    inputs = merged(call, call.flow(), dim).view(groups, -1)
    outputs = builder.new(call.shape[dim])
    builder.define(Product(outputs, weight, bias, inputs, transposed))
    if groups > 1:  # a group goes as a whole: then there is one fewer
        builder.tie(inputs, inputs[:, :1])
        builder.tie(outputs.view(groups, -1), inputs[:, :1])
        builder.axis(weight, 0, inputs.flatten() if transposed else outputs)
        builder.axis(weight, 1, fixed((call.args[1].shape[1],)))
    else:
        builder.axis(weight, int(transposed), outputs)
        builder.axis(weight, 1 - int(transposed), inputs[0])
    builder.axis(bias, 0, outputs)
    return spread(outputs, dim, call.shape)


def _embedding(call: Call) -> Any:
    table = call.args[0]
    if not isinstance(table, Named):
        return unknown(call)
    columns = call.builder.new(table.shape[1])
    call.builder.define(Values(columns, table.name, table.shape, dim=1))
    call.builder.axis(table.name, 0, fixed((table.shape[0],)))
    call.builder.axis(table.name, 1, columns)
    return spread(columns, -1, call.shape)


def _batch_norm(call: Call) -> Any:
    """Batch and instance norm: statistics of each channel for itself."""
    names = [_name(call.arg(i)) for i in range(1, 5)]
    if any(isinstance(call.arg(i), Tensor) for i in range(1, 5)):
        return unknown(call)
    running = not (call.name == "instance_norm" and call.arg(5))
    mean = names[2] if running else None
    return _norm(call, 1, names[0], names[1], names[2:], mean=mean)


def _joint_norm(call: Call) -> Any:
    """Group, layer and RMS norm: channels that share statistics have to stay."""
    by_group = call.name == "group_norm"
    parameters = [call.arg(2), None if call.name == "rms_norm" else call.arg(3)]
    if any(isinstance(p, Tensor) for p in parameters) or not (by_group or len(call.args[1]) == 1):
        return unknown(call)
    weight, bias = map(_name, parameters)
    return _norm(call, 1 if by_group else -1, weight, bias, joint=True)


def _norm(
    call: Call,
    dim: int,
    weight: str | None,
    bias: str | None,
    statistics: tuple[str | None, ...] | list[str | None] = (),
    mean: str | None = None,
    joint: bool = False,
) -> Tensor:
    builder = call.builder
    inputs = merged(call, call.flow(), dim)
    if joint:
        builder.pin(inputs, f"normalized together with others by {call.name}")
    outputs = builder.new(len(inputs))
    builder.tie(outputs, inputs)
    builder.define(Norm(outputs, inputs, weight, bias, mean, joint))
    for name in (weight, bias, *statistics):
        builder.axis(name, 0, outputs)
    return spread(outputs, dim, call.shape)


def _name(value: Any) -> str | None:
    return value.name if isinstance(value, Named) else None


_CONVOLUTIONS = [f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)]

LAYER_RULES: Mapping[str, Rule] = {
    "linear": _linear,
    "embedding": _embedding,
    "batch_norm": _batch_norm,
    "instance_norm": _batch_norm,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(("group_norm", "layer_norm", "rms_norm"), _joint_norm),
}
