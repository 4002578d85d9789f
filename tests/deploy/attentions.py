"""Attention as libraries compute it, each with sizes of its own to follow when heads go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS = 12, 4


class Fused(nn.Module):
    """timm's: one projection, sizes in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = HEADS, WIDTH // HEADS, WIDTH
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj(self.joined((weights @ v).transpose(1, 2)))

    def joined(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.attn_dim)


class FusedAsWide(Fused):
    """Older timm's: the width of the input is taken for that of all heads."""

    def forward(self, x: Tensor) -> Tensor:
        self_width = x.shape[-1]
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self_width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, self_width))


def rotated(x: Tensor) -> Tensor:
    """Rotary positions."""
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.ones(x.shape[-1]).to(x)
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class Grouped(nn.Module):
    """Llama's: separate projections, rotary positions, keys and values for several queries."""

    shared = 2

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups = 4, HEADS // self.shared
        self.num_heads = HEADS  # of which forward knows nothing
        rows, fewer = HEADS * 4, self.shared * 4
        self.q_proj = nn.Linear(WIDTH, rows, bias=False)
        self.k_proj = nn.Linear(WIDTH, fewer, bias=False)
        self.v_proj = nn.Linear(WIDTH, fewer, bias=False)
        self.o_proj = nn.Linear(rows, WIDTH, bias=False)

    def heads(self, projected: Tensor, of: str) -> Tensor:
        return projected.view(*projected.shape[:2], -1, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q = rotated(self.heads(self.q_proj(x), "q"))
        k, v = rotated(self.heads(self.k_proj(x), "k")), self.heads(self.v_proj(x), "v")
        k, v = self.repeated(k), self.repeated(v)
        scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        mixed = F.dropout(weights, 0.1, self.training) @ v
        return self.o_proj(mixed.transpose(1, 2).contiguous().reshape(*x.shape[:2], -1))

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, tokens, size = x.shape
        shares = self.num_key_value_groups
        wide = x[:, :, None].expand(batch, heads, shares, tokens, size)
        return wide.reshape(batch, heads * shares, tokens, size)


class GroupedSpelled(Grouped):
    """Older Llama's: numbers of heads in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_key_value_heads = self.shared

    def heads(self, projected: Tensor, of: str) -> Tensor:
        count = self.num_heads if of == "q" else self.num_key_value_heads
        batch, tokens, _ = projected.shape
        return projected.view(batch, tokens, count, self.head_dim).transpose(1, 2)


class GroupedNatively(Grouped):
    """``scaled_dot_product_attention`` finds the keys of its queries itself."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(layer(x), "") for layer in (self.q_proj, self.k_proj, self.v_proj))
        mask = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MultiQuery(Grouped):
    shared = 1


class Inner(nn.Module):
    """BERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = HEADS, WIDTH // HEADS
        self.all_head_size = WIDTH
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.num_attention_heads, self.attention_head_size)
        q, k, v = (f(x).view(shape).permute(0, 2, 1, 3) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).contiguous()
        return mixed.view(*mixed.shape[:2], self.all_head_size)


class Outer(nn.Module):
    """The output projection apart."""

    def __init__(self) -> None:
        super().__init__()
        self.self = Inner()
        self.output = nn.Sequential()
        self.output.add_module("dense", nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.self(x))


class Torch(nn.Module):
    def __init__(self, weights: bool = False, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)  # type: ignore[arg-type]
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        outputs, weights = self.attention(x, x, x)
        return outputs + weights.sum(-1, keepdim=True) if self.weights else outputs


class Network(nn.Module):
    """Two blocks, as in a Transformer."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attentions = nn.ModuleList(attention() for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 9), nn.GELU(), nn.Dropout(0.1), nn.Linear(9, WIDTH))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            x = x + attention(norm(x))
            x = x + mlp(x)
        return x


#: Layouts, and the attributes that have to follow.
LAYOUTS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "timm": (Fused, {"num_heads", "attn_dim"}),
    "llama": (Grouped, {"num_heads"}),
    "llama, spelled out": (GroupedSpelled, {"num_heads", "num_key_value_heads"}),
    "llama, native": (GroupedNatively, set()),
    "multi-query": (MultiQuery, {"num_heads", "num_key_value_groups"}),
    "bert": (Outer, {"num_attention_heads", "all_head_size"}),
    "torch": (Torch, set()),
    "torch, batch first": (lambda: Torch(batch_first=True), set()),
    "torch, biases": (lambda: Torch(add_bias_kv=True), set()),
    "torch, no bias": (lambda: Torch(bias=False), set()),
}
