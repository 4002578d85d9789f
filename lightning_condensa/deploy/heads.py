"""Attention of torch with fewer heads than its width is divided into."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FewerHeads(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` after heads were removed.

    Inputs and outputs have the width they had, ``embed_dim``; heads have the size they had,
    ``head_dim``; there are ``num_heads`` of them. Projections have ``num_heads`` times as many rows
    (of each queries, keys and values), the output projection as many columns. Parameters keep their
    names, and what a module is called with is the same.

    Attention weights that are returned are those of the heads that are left, or their average.

    Example:
        >>> attention = nn.MultiheadAttention(8, 4)
        >>> kept = [2, 3]  # rows and columns of the second head
        >>> rows = torch.tensor([i + start for start in (0, 8, 16) for i in kept])
        >>> attention.in_proj_weight = nn.Parameter(attention.in_proj_weight[rows])
        >>> attention.in_proj_bias = nn.Parameter(attention.in_proj_bias[rows])
        >>> attention.out_proj.weight = nn.Parameter(attention.out_proj.weight[:, kept])
        >>> FewerHeads.adopt(attention)
        >>> x = torch.zeros(5, 2, 8)
        >>> attention.num_heads, attention(x, x, x)[0].shape
        (1, torch.Size([5, 2, 8]))
    """

    @classmethod
    def adopt(cls, attention: nn.MultiheadAttention) -> None:
        """Make one of a module whose projections were cut, in place.

        Args:
            attention: The module, with what it had before: hooks, mode, parameters.
        """
        attention.num_heads = attention.out_proj.weight.shape[1] // attention.head_dim
        attention._qkv_same_embed_dim = False  # torch's fused kernels want all heads
        attention.__class__ = cls

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask: pass the mask, too")
        batched = query.dim() == 3
        if batched and not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        elif not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = self._projected(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q.shape[0], query)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = (weights if mask is None else weights + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        outputs: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return outputs[0], None if weights is None else weights[0]
        return outputs if self.batch_first else outputs.transpose(0, 1), weights

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """Queries, keys and values, each ``(batch, heads, length, head_dim)``."""
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        found = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
        for i, bias in ((1, self.bias_k), (2, self.bias_v)):
            if bias is not None:
                found[i] = torch.cat([found[i], bias.expand(found[i].shape[0], -1, -1)], dim=1)
        if self.add_zero_attn:
            found[1:] = [F.pad(t, (0, 0, 0, 1)) for t in found[1:]]
        return [torch.unflatten(t, -1, (-1, self.head_dim)).transpose(1, 2) for t in found]

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, batch: int, like: Tensor
    ) -> Tensor | None:
        """What is added to scores, to be spread over ``(batch, heads, queries, keys)``."""
        added = []
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.view(batch, -1, *attn_mask.shape[1:])
            added.append(attn_mask)
        if padding is not None:
            added.append(padding[:, None, None])
        more = (self.bias_k is not None) + self.add_zero_attn
        floats = [
            like.new_zeros(m.shape).masked_fill(m, float("-inf")) if m.dtype == torch.bool else m
            for m in added
        ]
        mask: Tensor | None = sum(floats[1:], floats[0]) if floats else None
        return mask if mask is None or not more else F.pad(mask, (0, int(more)))
