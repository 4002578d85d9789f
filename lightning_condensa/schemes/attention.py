"""Where attention modules keep their heads: styles as data, and how a module is read by one.

A style maps paths inside an attention module to the *role* of what is found there: a layer with a
``weight`` and perhaps a ``bias``, or a parameter.

========== ========================================================================================
role       rows (outputs) of the projection
========== ========================================================================================
``q``      the queries of all heads, one head after the other
``k``      keys
``v``      values
``qkv``    all queries, then all keys, then all values
``head``   head by head (key-value head by key-value head), the queries, keys and values of each
``o``      the output projection: its *columns* (inputs) belong to heads, its rows and bias to none
========== ========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from torch import nn

from lightning_condensa.functional.spans import Spans
from lightning_condensa.schemes.joint import JointTarget, Member
from lightning_condensa.schemes.selection import SelectionError

ROLES = ("q", "k", "v", "qkv", "head", "o")

#: Layers whose weights are ``(in, out)``: GPT-2's in ``transformers``.
_INPUT_FIRST = ("Conv1D",)

#: Attributes that hold a number of query heads.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")


def _separate(query: str, key: str, value: str, out: str) -> dict[str, str]:
    return {query: "q", key: "k", value: "v", out: "o"}


_TORCH = {"in_proj_bias": "qkv", "bias_k": "k", "bias_v": "v", "out_proj": "o"}

#: ``torch.nn.MultiheadAttention`` and what is widely used; the first that fits a module counts.
STYLES: Sequence[Mapping[str, str]] = (
    {"in_proj_weight": "qkv", **_TORCH},
    {**_separate("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"), **_TORCH},
    _separate("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen
    _separate("q_proj", "k_proj", "v_proj", "out_proj"),  # BART, CLIP, OPT, Whisper
    _separate("q_proj", "k_proj", "v_proj", "dense"),  # Phi
    _separate("self.query", "self.key", "self.value", "output.dense"),  # BERT and its kin
    _separate("attention.query", "attention.key", "attention.value", "output.dense"),  # ViT
    _separate("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    _separate("q", "k", "v", "o"),  # T5
    _separate("to_q", "to_k", "to_v", "to_out.0"),  # diffusers
    _separate("wq", "wk", "wv", "wo"),  # Llama as published
    {"qkv": "qkv", "proj": "o"},  # timm
    {"qkv_proj": "qkv", "o_proj": "o"},  # Phi-3
    {"c_attn": "qkv", "c_proj": "o"},  # GPT-2
    {"wqkv": "qkv", "wo": "o"},  # gpt-fast
    {"query_key_value": "head", "dense": "o"},  # BLOOM, Falcon, GPT-NeoX
)


@dataclass(frozen=True)
class _Part:
    """One parameter of an attention module.

    Attributes:
        name: Its name in the whole network.
        role: What its rows, or columns, are.
        shape: Its shape.
        dim: The dimension that heads divide.
        bias: Whether it is a bias.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dim: int
    bias: bool


@dataclass(frozen=True)
class Attention:
    """An attention module that a style fits.

    Attributes:
        path: Its name in the network.
        layer: The name of its class.
        parts: Its parameters; weights first, those of the queries before the others.
        num_heads: Query heads; ``None`` where no attribute says.
    """

    path: str
    layer: str
    parts: tuple[_Part, ...]
    num_heads: int | None

    @property
    def name(self) -> str:
        """What the module goes by: the name of its first weight."""
        return self.parts[0].name

    def target(self) -> JointTarget:
        """The parameters of the module, cut into heads.

        Query heads that share keys and values are one group. Where all of them share one head of
        keys and values, that stays, and the groups are the query heads.

        Raises:
            SelectionError: If shapes do not divide into heads, or the number of heads is unknown.
        """
        sections, count = self._sections()
        weights: list[Member] = []
        biases: list[Member] = []
        for part in self.parts:
            of_part = sections[part.role]
            if of_part:
                member = Member(part.name, Spans(count, of_part, part.dim))
                (biases if part.bias else weights).append(member)
        first = self.parts[0]
        return JointTarget(
            first.name, first.shape, self.layer, weights=tuple(weights), biases=tuple(biases)
        )

    def _sections(self) -> tuple[dict[str, tuple[int, ...]], int]:
        """For each role the extents of what groups share, and how many groups there are."""
        heads = self.num_heads
        if heads is None:
            raise SelectionError(
                f"{self.path or self.layer} does not say how many heads it has "
                f"(attributes {', '.join(HEAD_COUNTS)}): give num_heads="
            )
        extents = {p.role: p.shape[p.dim] for p in self.parts if not p.bias}
        fused = extents.get("qkv", extents.get("head"))
        if fused is not None:
            size = value_size = extents["o"] // heads
            shared = (fused // max(size, 1) - heads) // 2
        else:
            size = extents["q"] // heads
            shared = extents["k"] // max(size, 1)
            value_size = extents["v"] // max(shared, 1)
        rows = (heads * size, shared * size, shared * value_size)
        whole = {"q": rows[0], "k": rows[1], "v": rows[2], "o": heads * value_size}
        whole |= {"qkv": sum(rows), "head": sum(rows)}
        wrong = [p for p in self.parts if p.shape[p.dim] != whole[p.role]]
        if wrong or shared < 1 or heads % shared:
            found = ", ".join(f"{p.name} {p.shape}" for p in self.parts)
            raise SelectionError(
                f"{self.path or self.layer} cannot be cut into {heads} heads: {found}; "
                "leave it out with exclude=, or describe it with projections= and num_heads="
            )
        sections: dict[str, tuple[int, ...]] = {"q": rows[:1], "o": (whole["o"],)}
        if shared == 1 < heads:  # multi-query attention: keys and values are everybody's
            return sections | {"k": (), "v": (), "qkv": rows[:1], "head": rows[:1]}, heads
        sections |= {"k": rows[1:2], "v": rows[2:], "qkv": rows, "head": (sum(rows),)}
        return sections, shared


def attentions(
    module: nn.Module,
    types: Sequence[str],
    styles: Sequence[Mapping[str, str]] = STYLES,
    num_heads: int | str | None = None,
) -> Iterator[Attention]:
    """The attention modules of a network, in its order.

    Args:
        module: The network.
        types: Class names of attention modules, matched against each one's class and its bases;
            empty for all.
        styles: Paths to roles; see the head of this file.
        num_heads: Query heads, or the path of the attribute that holds their number.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    for path, layer in module.named_modules():
        bases = {base.__name__ for base in type(layer).__mro__}
        if types and bases.isdisjoint(types):
            continue
        for style in styles:
            parts = _parts(layer, style, names)
            if parts is not None:
                owners = [_at(layer, p.rpartition(".")[0]) for p in style]
                count = _count([layer, *owners], num_heads)
                yield Attention(path, type(layer).__name__, parts, count)
                break


def _parts(
    layer: nn.Module, style: Mapping[str, str], names: Mapping[int, str]
) -> tuple[_Part, ...] | None:
    """What a style finds in a module; ``None`` where it does not fit."""
    parts = []
    for path, role in style.items():
        found = _at(layer, path)
        parameters = {path: found}
        if isinstance(found, nn.Module):
            parameters = {"weight": getattr(found, "weight", None)}
            if role != "o":
                parameters["bias"] = getattr(found, "bias", None)
        for name, parameter in parameters.items():
            bias = name.endswith("bias") or name.startswith("bias_")
            if bias and parameter is None:
                continue
            if not isinstance(parameter, nn.Parameter) or id(parameter) not in names:
                return None
            shape = tuple(parameter.shape)
            dim = len(shape) - 1
            if not bias:
                dim = int((role == "o") != (type(found).__name__ in _INPUT_FIRST))
            if dim >= len(shape):
                return None
            parts.append(_Part(names[id(parameter)], role, shape, dim, bias))
    return tuple(sorted(parts, key=lambda part: part.bias))


def _at(owner: object, path: str) -> object:
    """The attribute at a dotted path; ``None`` where there is none."""
    steps = path.split(".") if path else []
    return reduce(lambda found, step: getattr(found, step, None), steps, owner)


def _count(owners: Sequence[object], given: int | str | None) -> int | None:
    """The number of heads: as given, or by the first attribute of an owner, or of its config."""
    if isinstance(given, int):
        return given
    names = HEAD_COUNTS if given is None else (given,)
    places = [*owners, *(getattr(owner, "config", None) for owner in owners)]
    values = (_at(place, name) for place in places for name in names)
    return next((v for v in values if type(v) is int and v > 0), None)
