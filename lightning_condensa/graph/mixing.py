"""Rules for products of activations: attention, above all.

Heads are what such products keep apart: matrices of a batch, each of which is computed from the
matrices at the same place of the operands. All channels of a matrix are tied to one, so that a head
is removed with its queries, keys and values, or stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_condensa.graph.builder import varying
from lightning_condensa.graph.channels import FIXED
from lightning_condensa.graph.definitions import Elementwise
from lightning_condensa.graph.flows import Call, Named, Rule, unknown


def _matmul(call: Call) -> Any:
    """``a @ b``, with or without batches."""
    operands = call.args[:2]
    if any(isinstance(a, Named) or a.dim() < 2 for a in operands):
        return unknown(call)
    return _mixed(call, operands, factors=(0, 1))


def _baddbmm(call: Call) -> Any:
    """``bias + a @ b``, as ``nn.MultiheadAttention`` adds a mask."""
    bias, *operands = call.args
    if any(isinstance(a, Named) for a in call.args) or not _is_alike(call, operands, bias):
        return unknown(call)
    return _mixed(call, operands)


def _attention(call: Call) -> Any:
    """Scaled dot products of queries and keys weigh the values."""
    query, key, value = operands = call.args[:3]
    keywords = dict(zip(call.node.kwargs, call.keywords, strict=True))
    mask = call.arg(3, keywords.get("attn_mask"))
    if any(isinstance(a, Named) for a in operands) or isinstance(mask, Named):
        return unknown(call)
    if keywords.get("enable_gqa"):
        shares = query.shape[-3] // key.shape[-3]
        operands = [query, *(t.repeat_interleave(shares, -3) for t in (key, value))]
    if mask is not None and not _is_alike(call, operands, mask):
        return unknown(call)
    return _mixed(call, operands, factors=(2,))


def _is_alike(call: Call, operands: Sequence[Tensor], added: Tensor) -> bool:
    """Whether what is added is a constant, the same for all matrices that differ."""
    shape = call.shape[:-2]
    wide = added.expand(*shape, *added.shape[-2:]) if added.dim() > 2 else added
    along = {d for o in operands for d in varying(o.expand(*shape, *o.shape[-2:]))}
    real = {d for d in range(wide.dim() - 2) if wide.stride(d) != 0 and wide.shape[d] > 1}
    return not bool((added != FIXED).any()) and not along & real


def _mixed(call: Call, operands: Sequence[Tensor], factors: Sequence[int] = ()) -> Tensor:
    """One channel for each matrix of the result that is made of other channels.

    Args:
        call: The operator.
        operands: Flows of batches of matrices.
        factors: The operands of which one that is zero makes the result zero.
    """
    shape = call.shape[:-2]
    wide = [o.expand(*shape, *o.shape[-2:]) for o in operands]
    own = [[d for d in varying(o) if d < len(shape)] for o in wide]
    along = sorted({d for dims in own for d in dims})
    count = prod(shape[d] for d in along)
    rows = [_matrices(o, along) for o in wide]
    which = torch.unique(torch.cat(rows, 1), dim=0, return_inverse=True)[1]
    outputs = call.builder.new(int(which.max()) + 1 if count else 0)
    first = torch.empty(len(outputs), dtype=torch.long)
    first[which] = torch.arange(count)
    summaries = []
    for operand, dims, each in zip(wide, own, rows, strict=True):
        matrices = each[first]
        summary = call.builder.new(len(outputs))
        call.builder.define(Elementwise(summary, matrices.t(), "all"))
        summaries.append(summary)
        if dims == along:
            call.builder.tie(matrices, outputs[:, None])
        else:  # queries share it
            call.builder.pin(operand, f"shared between matrices that {call.name} computes")
    if factors:
        zeros = torch.stack([summaries[i] for i in factors])
        call.builder.define(Elementwise(outputs, zeros, "any"))
    sizes = [shape[d] if d in along else 1 for d in range(len(shape))]
    result = outputs[which].view(*sizes, 1, 1).expand(call.shape)
    for operand, dims in zip(operands, own, strict=True):
        for dim in set(along) - set(dims):  # copies of what is shared, as many as the code says
            if (
                operand.dim() - len(call.shape) + dim >= 0
                and operand.shape[dim - len(call.shape)] > 1
            ):
                call.builder.resize(result.movedim(dim, 0).flatten(1)[:, 0], call.where)
    return result


def _matrices(flow: Tensor, along: Sequence[int]) -> Tensor:
    """The channels of each matrix of a batch, shape ``(matrices, different ones at most)``."""
    for dim in range(flow.dim() - 2):
        if dim not in along:
            flow = flow.narrow(dim, 0, 1)
    for dim in (-2, -1):
        if flow.dim() + dim not in varying(flow):
            flow = flow.narrow(dim, 0, 1)
    return flow.reshape(-1, flow.shape[-2] * flow.shape[-1])


MIXING_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    "baddbmm": _baddbmm,
    "scaled_dot_product_attention": _attention,
}
