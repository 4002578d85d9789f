"""Pruning of whole attention heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from lightning_condensa.schemes.attention import ROLES, STYLES, attentions
from lightning_condensa.schemes.joint import Candidate, JointPrune


@dataclass(frozen=True)
class HeadPrune(JointPrune):
    """Remove whole attention heads.

    Of a removed head the rows of the query, key and value projections, with their biases, and the
    columns of the output projection are zero: the module computes what it would without the head.
    A head is scored over all of these weights; the output projection's bias belongs to no head.

    Query heads that share keys and values (grouped-query attention) are one group. Where all share
    one head of keys and values (multi-query attention), query heads are removed one by one and keys
    and values stay. ``density``, ``min_per_layer`` and ``align`` count groups.

    It finds ``torch.nn.MultiheadAttention`` and the layouts of widely used libraries
    (:data:`lightning_condensa.schemes.attention.STYLES`). Describe your own with ``projections``:

    Example:
        >>> HeadPrune(
        ...     0.5,
        ...     types="MyAttention",
        ...     projections={"to_qkv": "qkv", "to_out": "o"},
        ...     num_heads="n_head",
        ... ).describe()
        "HeadPrune(density=0.5, types=('MyAttention',), \
projections={'to_qkv': 'qkv', 'to_out': 'o'}, num_heads='n_head')"

    Attributes:
        projections: Path in the attention module (``"to_q"``, ``"to_out.0"``) → role: ``"q"``,
            ``"k"``, ``"v"`` and ``"o"`` (output); ``"qkv"`` for one projection with all queries,
            then all keys, then all values; ``"head"`` for one that goes head by head. Empty for
            the layouts that are known.
        num_heads: Number of query heads, or the path in the attention module to it; looked for
            under the usual names if not given.
        include: Regular expressions over the names of the query (or fused) projections' weights,
            by which attention modules go; so are ``exclude`` and ``overrides``.
        types: Class names of the attention modules; empty for all whose layout fits.
    """

    projections: Mapping[str, str] = field(default_factory=dict, kw_only=True, hash=False)
    num_heads: int | str | None = field(default=None, kw_only=True)

    default_types: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = "attention"
    advice: ClassVar[str] = ". Describe your own with projections= and num_heads="

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "projections", dict(self.projections))
        roles = sorted(self.projections.values(), key=str)
        if roles and roles not in (["k", "o", "q", "v"], ["o", "qkv"], ["head", "o"]):
            raise ValueError(
                "projections must name the places of q, k, v and o, of qkv and o, or of head and "
                f"o (roles are {', '.join(ROLES)}), got {self.projections!r}"
            )
        count = self.num_heads
        named = isinstance(count, str) and count
        if count is not None and not named and (type(count) is not int or count < 1):
            raise ValueError(f"num_heads must be an int >= 1 or an attribute's name, got {count!r}")

    def candidates(self, module: nn.Module) -> Iterator[Candidate]:
        """The attention modules."""
        styles = [self.projections] if self.projections else STYLES
        for found in attentions(module, self.layer_types, styles, self.num_heads):
            yield Candidate(found.name, tuple(part.name for part in found.parts), found.target)
