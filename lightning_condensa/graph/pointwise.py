"""Rules for functions of single elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_condensa.graph.builder import compact, varying
from lightning_condensa.graph.channels import FIXED
from lightning_condensa.graph.definitions import Elementwise
from lightning_condensa.graph.flows import Call, Named, Rule, fixed, flow_of, spread

_ZeroIf = Literal["all", "any", "first"]


def pointwise(call: Call) -> Tensor:
    """A function of one element of each operand: operands of a sum hold the same channels."""
    operands = [a for a in call.args if isinstance(a, Tensor | Named)]
    alone = [_is_spread(a, operands) for a in operands]
    flows = []
    for operand, is_spread in zip(operands, alone, strict=True):
        if is_spread and isinstance(operand, Tensor):
            call.builder.pin(operand, f"spread over other channels by {call.name}")
        known = not (is_spread and isinstance(operand, Named))
        flows.append(flow_of(call.builder, operand) if known else fixed(operand.shape))
    tied = [i for i, is_spread in enumerate(alone) if not is_spread]
    return _combined(call, flows, tied, _zero_if(call))


def _zero_if(call: Call) -> _ZeroIf | None:
    name = call.name.removesuffix("_")
    if name in ("mul", "div"):
        return "any" if name == "mul" else "first"
    return "all" if _keeps_zero(call) else None


def _keeps_zero(call: Call) -> bool:
    """Whether the function of zeros is zero."""
    zeros = [torch.zeros(()) if isinstance(a, Tensor | Named) else a for a in call.args]
    try:
        result = call.node.target(*zeros, **call.node.kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError):
        return False  # it takes no floating point numbers: nothing is lost but an opportunity
    return bool((result == 0).all())


def _is_spread(operand: Any, others: Sequence[Any]) -> bool:
    """Whether one element meets several channels of another operand."""
    own = [n == 1 for n in reversed(operand.shape)]
    for other in others:
        if other is not operand:
            dims = varying(other) if isinstance(other, Tensor) else range(len(other.shape))
            behind = [len(other.shape) - 1 - d for d in dims if other.shape[d] > 1]
            if any(i >= len(own) or own[i] for i in behind):
                return True
    return False


def _combined(
    call: Call, flows: Sequence[Tensor], tied: Sequence[int], zero_if: _ZeroIf | None
) -> Tensor:
    """Channels of a result: one for each combination of operands, tied to those it is made of."""
    wide = [flow.expand(call.shape) for flow in flows]
    if zero_if is not None and len(wide) == 1:
        return wide[0]
    if all(not bool((compact(flow) != FIXED).any()) for flow in wide):
        return fixed(call.shape)
    for dim in range(len(call.shape)):
        if all(flow.stride(dim) == 0 for flow in wide):
            wide = [flow.narrow(dim, 0, 1) for flow in wide]
    columns, which = _distinct(torch.stack([flow.flatten() for flow in wide]))
    outputs = call.builder.new(columns.shape[1])
    if zero_if is not None:
        call.builder.define(Elementwise(outputs, columns, zero_if))
    for i in tied:
        call.builder.tie(columns[i], outputs)
    return outputs[which].view(wide[0].shape).expand(call.shape)


def _distinct(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The different columns of a matrix, and which of them stands at each place."""
    which = torch.zeros(columns.shape[1], dtype=torch.long)
    for row in columns:
        keys = which * (int(row.max()) + 1) + row
        which = torch.unique(keys, return_inverse=True)[1]
    places = torch.empty(int(which.max()) + 1, dtype=torch.long)
    places[which] = torch.arange(len(which))
    return columns[:, places], which


def opaque(call: Call, flow: Tensor) -> Tensor:
    """A function that maps zeros to anything."""
    return _combined(call, [flow], [0], None)


def _identity(call: Call) -> Tensor:
    return call.flow()


def _prelu(call: Call) -> Tensor:
    weight = call.args[1]
    if not isinstance(weight, Named) or weight.shape.numel() == 1:
        return call.flow()
    slopes = spread(flow_of(call.builder, weight), 1, call.shape)
    return _combined(call, [call.flow(), slopes], [0, 1], "first")


def _glu(call: Call) -> Tensor:
    """``a·σ(b)``, with both halves of the input."""
    halves = call.flow().chunk(2, call.arg(1, -1))
    return _combined(call, halves, [0, 1], "first")


#: What evaluation mode makes nothing of, and changes of type and layout.
_IDENTITIES = (
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"),
    *("contiguous", "clone", "alias", "detach", "to", "type_as", "lift_fresh_copy", "relu"),
)

POINTWISE_RULES: Mapping[str, Rule] = {
    "prelu": _prelu,
    "glu": _glu,
    **dict.fromkeys(_IDENTITIES, _identity),
    **dict.fromkeys(("hardswish", "log_sigmoid", "rsub"), pointwise),  # not tagged as such
}
