"""Rules for operators that move elements about, or take one of many positions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_condensa.graph.builder import varying
from lightning_condensa.graph.flows import (
    Call,
    Rule,
    constants,
    fixed,
    flow_of,
    unknown,
    varies,
)
from lightning_condensa.graph.pointwise import opaque


def _moved(call: Call) -> Tensor:
    """The operator itself, run on the flow."""
    flow: Tensor = call.node.target(call.flow(), *call.args[1:], **call.node.kwargs)  # type: ignore[operator]
    return flow


def _expanded(call: Call) -> Tensor:
    return call.flow().expand(call.shape)


def _reshaped(call: Call) -> Any:
    """A view; sizes that the code spells out may not follow when channels go."""
    flow = call.flow()
    if call.name == "unflatten":
        dim = call.args[1] % flow.dim()
        asked = [*flow.shape[:dim], *call.args[2], *flow.shape[dim + 1 :]]
    elif isinstance(call.args[1], list | tuple):
        asked = list(call.args[1])
    else:  # a view as another type
        return unknown(call)
    result = flow.reshape(call.shape)
    before, after = varying(flow), varying(result)
    kept = [flow.shape[d] for d in before] == [result.shape[d] for d in after]
    # As everybody writes it: sizes that stay are read from the input, others are -1.
    if not kept and not (len(after) == 1 and asked[after[0]] == -1):
        call.builder.reshape(flow, result, asked, call.where)
    return result


def _joined(call: Call) -> Tensor:
    flows = [flow_of(call.builder, value) for value in call.args[0]]
    joined: Tensor = call.node.target(flows, *call.args[1:])  # type: ignore[operator]
    return joined


def _cut(call: Call) -> Any:
    """A part at a position that the code spells out."""
    flow = call.flow()
    result = call.node.target(flow, *call.args[1:])  # type: ignore[operator]
    dim = call.arg(2 if "split" in call.name else 1, 0)
    whole = isinstance(result, Tensor) and result.shape == flow.shape
    if varies(flow, [dim]) and not whole:
        call.builder.cut(flow, dim % flow.dim(), f"cut at a fixed position by {call.name}")
    return result


def _chunked(call: Call) -> Any:
    """Equal parts: they stay equal when they lose the same."""
    flow, dim = call.flow(), call.arg(2, 0)
    parts = flow.chunk(call.args[1], dim)
    if varies(flow, [dim]):
        for part in parts[1:]:
            if part.shape != parts[0].shape:
                call.builder.pin(flow, "cut into unequal parts by chunk")
                break
            call.builder.tie(part, parts[0])
    return parts


def _padded(call: Call) -> Any:
    flow, padding = call.flow(), call.args[1]
    zeros = call.arg(2, "constant") in ("constant", 0) and not call.arg(3, 0)
    if call.name == "constant_pad_nd":
        zeros = not call.arg(2, 0)
    elif call.name != "pad" or call.arg(2, "constant") != "constant":
        zeros = True  # borders are made of the input's own elements
    for i, (low, high) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        dim = flow.dim() - 1 - i
        if varies(flow, [dim]):
            if low < 0 or high < 0:
                return unknown(call)
            sides = [fixed((*flow.shape[:dim], n, *flow.shape[dim + 1 :])) for n in (low, high)]
            flow = torch.cat([sides[0], flow, sides[1]], dim)
        else:
            flow = _resized(flow, dim, flow.shape[dim] + low + high)
    return flow if zeros else opaque(call, flow)


def _reduced(call: Call) -> Any:
    """A mean or a sum over dimensions."""
    flow = call.flow()
    given = call.arg(1)
    dims = [given] if isinstance(given, int) else given or list(range(flow.dim()))
    if varies(flow, dims):
        return unknown(call)
    for dim in sorted({d % flow.dim() for d in dims}, reverse=True):
        flow = flow.narrow(dim, 0, 1) if call.arg(2, False) else flow.select(dim, 0)
    return flow


def _pooled(call: Call) -> Any:
    """Windows over positions, with or without indices."""
    flow = call.flow()
    dimensions = int(re.findall(r"\d", call.name)[0])
    if varies(flow, range(-dimensions, 0)):
        return unknown(call)
    result = call.node.meta["val"]
    shape = (result if isinstance(result, Tensor) else result[0]).shape
    for dim in range(-dimensions, 0):
        flow = _resized(flow, dim, shape[dim])
    return flow if isinstance(result, Tensor) else [flow, *constants(result[1:])]


def _softmax(call: Call) -> Any:
    flow = call.flow()
    return unknown(call) if varies(flow, [call.args[1]]) else opaque(call, flow)


def _getitem(call: Call) -> Any:
    return call.args[0][call.args[1]]


def _resized(flow: Tensor, dim: int, size: int) -> Tensor:
    sizes = list(flow.shape)
    sizes[dim] = size
    return flow.narrow(dim, 0, 1).expand(sizes)


_POOLS = [
    f"{adaptive}{kind}_pool{n}d{indices}"
    for adaptive in ("", "adaptive_")
    for kind, suffixes in (("avg", ("",)), ("max", ("", "_with_indices")))
    for n in (1, 2, 3)
    for indices in suffixes
]
_UPSAMPLES = (
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
    *(f"upsample_nearest{exact}{n}d" for exact in ("", "_exact") for n in (1, 2, 3)),
)
_MOVES = (
    *("permute", "transpose", "t", "movedim", "swapaxes", "unsqueeze", "squeeze", "flatten"),
    *("repeat", "flip", "roll", "mT", "numpy_T"),
)
_PADS = (
    *("pad", "constant_pad_nd"),
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
)

MOVEMENT_RULES: Mapping[str, Rule] = {
    "getitem": _getitem,
    "chunk": _chunked,
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys(("expand", "expand_as"), _expanded),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "unflatten"), _reshaped),
    **dict.fromkeys(("cat", "concat", "stack"), _joined),
    **dict.fromkeys(("slice", "select", "narrow", "split", "split_with_sizes", "unbind"), _cut),
    **dict.fromkeys(_PADS, _padded),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduced),
    **dict.fromkeys((*_POOLS, *_UPSAMPLES), _pooled),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax"), _softmax),
}
