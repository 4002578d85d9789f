"""Self-attention as different libraries write it, computed from some of its heads at will."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: list[int]) -> Tensor:
    """Attention of the kept query heads only.

    Args:
        q: ``(length, heads, size)``.
        k: ``(length, shared, size)``; each is used by ``heads / shared`` queries in a row.
        v: Likewise.
        out: The output projection's weight, ``(features, heads * size)``.
        kept: The query heads.
    """
    share = q.shape[1] // k.shape[1]
    columns = out.unflatten(1, (q.shape[1], -1))
    result = torch.zeros(len(q), len(out), dtype=q.dtype)
    for head in kept:
        weights = (q[:, head] @ k[:, head // share].T / q.shape[2] ** 0.5).softmax(-1)
        result = result + weights @ v[:, head // share] @ columns[:, head].T
    return result


class Attention(nn.Module):
    """Base: subclasses say where queries, keys and values come from."""

    count, shared, size, features = 4, 4, 3, 10

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def out_weight(self) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def forward(self, x: Tensor, kept: list[int] | None = None) -> Tensor:
        weight, bias = self.out_weight()
        kept = list(range(self.count)) if kept is None else kept
        result = attend(*self.projected(x), weight, kept)
        return result if bias is None else result + bias


class Separate(Attention):
    """Llama's names, grouped-query attention, the number of heads in a configuration."""

    shared = 2
    names = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=self.count)
        rows = [self.count * self.size, self.shared * self.size, self.shared * self.size]
        for name, n in zip(self.names, rows, strict=False):
            setattr(self, name, nn.Linear(self.features, n, bias=bias))
        setattr(self, self.names[3], nn.Linear(rows[0], self.features, bias=bias))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (getattr(self, name)(x) for name in self.names[:3])
        return tuple(t.unflatten(-1, (-1, self.size)) for t in (q, k, v))  # type: ignore[return-value]

    def out_weight(self) -> tuple[Tensor, Tensor | None]:
        out = getattr(self, self.names[3])
        return out.weight, out.bias


class MultiQuery(Separate):
    shared = 1


class T5(Separate):
    shared = 4
    names = ("q", "k", "v", "o")

    def __init__(self) -> None:
        super().__init__(bias=False)
        self.n_heads = self.count
        del self.config


class Bert(Attention):
    """Projections in one submodule, the output in another."""

    def __init__(self) -> None:
        super().__init__()
        self.self = nn.Module()
        for name in ("query", "key", "value"):
            setattr(self.self, name, nn.Linear(self.features, self.count * self.size))
        self.self.num_attention_heads = self.count
        self.output = nn.Module()
        self.output.dense = nn.Linear(self.count * self.size, self.features)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layers = (self.self.query, self.self.key, self.self.value)
        return tuple(layer(x).unflatten(-1, (self.count, -1)) for layer in layers)  # type: ignore[return-value]

    def out_weight(self) -> tuple[Tensor, Tensor | None]:
        return self.output.dense.weight, self.output.dense.bias


class Fused(Attention):
    """timm's: queries, keys and values of all heads in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = self.count
        self.qkv = nn.Linear(self.features, 3 * self.count * self.size)
        self.proj = nn.Linear(self.count * self.size, self.features)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).unflatten(-1, (3, self.count, -1)).unbind(1)

    def out_weight(self) -> tuple[Tensor, Tensor | None]:
        return self.proj.weight, self.proj.bias


class FusedGrouped(Attention):
    """Phi-3's: all queries, then fewer keys and values."""

    shared = 2

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = self.count
        self.qkv_proj = nn.Linear(
            self.features, (self.count + 2 * self.shared) * self.size, bias=False
        )
        self.o_proj = nn.Linear(self.count * self.size, self.features, bias=False)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        all_heads = self.qkv_proj(x).unflatten(-1, (-1, self.size))
        return all_heads.split((self.count, self.shared, self.shared), dim=1)  # type: ignore[return-value]

    def out_weight(self) -> tuple[Tensor, Tensor | None]:
        return self.o_proj.weight, None


class FusedMultiQuery(FusedGrouped):
    shared = 1


class ByHead(Attention):
    """Falcon's: key-value head by key-value head its queries, key and value."""

    shared = 2

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = self.count
        self.query_key_value = nn.Linear(self.features, (self.count + 2 * self.shared) * self.size)
        self.dense = nn.Linear(self.count * self.size, self.features)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        share = self.count // self.shared
        groups = self.query_key_value(x).unflatten(-1, (self.shared, share + 2, self.size))
        return groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]

    def out_weight(self) -> tuple[Tensor, Tensor | None]:
        return self.dense.weight, self.dense.bias


class ByHeadMultiQuery(ByHead):
    shared = 1


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is ``(in, out)``."""

    def __init__(self, rows: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, rows))
        self.bias = nn.Parameter(torch.randn(rows))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GPT2(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = self.count
        self.c_attn = Conv1D(3 * self.count * self.size, self.features)
        self.c_proj = Conv1D(self.features, self.count * self.size)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.c_attn(x).unflatten(-1, (3, self.count, -1)).unbind(1)

    def out_weight(self) -> tuple[Tensor, Tensor | None]:
        return self.c_proj.weight.T, self.c_proj.bias


class Torch(Attention):
    """``nn.MultiheadAttention``, beside the same written out."""

    features, size = 12, 3

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.torch = nn.MultiheadAttention(self.features, self.count, **options)  # type: ignore[arg-type]

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.torch
        fused = own._qkv_same_embed_dim
        separate = (own.q_proj_weight, own.k_proj_weight, own.v_proj_weight)
        weights = own.in_proj_weight.chunk(3) if fused else separate
        biases = (None,) * 3 if own.in_proj_bias is None else own.in_proj_bias.chunk(3)
        q, k, v = (functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        if own.bias_k is not None:
            k, v = torch.cat([k, own.bias_k[0]]), torch.cat([v, own.bias_v[0]])
        return tuple(t.unflatten(-1, (self.count, -1)) for t in (q, k, v))  # type: ignore[return-value]

    def out_weight(self) -> tuple[Tensor, Tensor | None]:
        return self.torch.out_proj.weight, self.torch.out_proj.bias

    def forward(self, x: Tensor, kept: list[int] | None = None) -> Tensor:
        if kept is None:
            return self.torch(x, x, x)[0]
        return super().forward(x, kept)


class TorchSeparate(Torch):
    """With weights of their own for keys and values."""

    def __init__(self) -> None:
        super().__init__(kdim=12, vdim=12)
        own = self.torch
        own._qkv_same_embed_dim = False
        for name, weight in zip("qkv", own.in_proj_weight.chunk(3), strict=True):
            setattr(own, f"{name}_proj_weight", nn.Parameter(weight.detach().clone()))
        own.register_parameter("in_proj_weight", None)


STYLES = {
    "llama": Separate,
    "multi-query": MultiQuery,
    "t5": T5,
    "bert": Bert,
    "timm": Fused,
    "phi-3": FusedGrouped,
    "fused multi-query": FusedMultiQuery,
    "falcon": ByHead,
    "falcon multi-query": ByHeadMultiQuery,
    "gpt-2": GPT2,
    "torch": Torch,
    "torch, extra bias": lambda: Torch(add_bias_kv=True),
    "torch, no bias": lambda: Torch(bias=False),
    "torch, separate": TorchSeparate,
}
