"""Uniform quantization to narrow floats and integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_condensa.functional.placement import elementwise, like, local, shrunk
from lightning_condensa.functional.quantization import cast, integer_codes, symmetric_scale
from lightning_condensa.functional.ranks import Ranks
from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.bound import QUANTIZE
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.finite import require_finite
from lightning_condensa.schemes.selection import Target
from lightning_condensa.schemes.space import Choice

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LEVELS = {"int8": 127}


@dataclass(frozen=True)
class Quantize(Scheme):
    """Store weights in a narrow type; zeros stay exactly zero.

    Floats are rounded to nearest. Integers use a symmetric grid ``scale · {−127 … 127}`` whose
    scale minimizes the squared error. Of a DTensor the scales and codes are those of the whole
    weight: where shards cut a channel, its largest magnitude and its errors, in double precision,
    are summed up over the processes.

    Attributes:
        dtype: ``"float16"``, ``"bfloat16"``, ``"int8"``, or a ``Choice`` of them.
        granularity: Integer types: one scale per output ``"channel"``, or per ``"tensor"``.

    Example:
        >>> bound = Quantize("int8").bind(torch.nn.Linear(3, 1, bias=False))
        >>> bound.pi({"weight": torch.tensor([[12.7, 0.0, -5.0]])})["weight"].codes
        tensor([[127,   0, -50]], dtype=torch.int8)
    """

    dtype: str | Choice = "float16"
    granularity: Literal["channel", "tensor"] = field(default="channel", kw_only=True)

    order: ClassVar[int] = QUANTIZE

    def __post_init__(self) -> None:
        super().__post_init__()
        accepted = [*FLOATS, *LEVELS]
        options = self.dtype.options if isinstance(self.dtype, Choice) else (self.dtype,)
        for option in options:
            if option not in accepted:
                raise ValueError(f"dtype must be one of {accepted}, or a Choice, got {option!r}")
        if self.granularity not in ("channel", "tensor"):
            raise ValueError(f"granularity must be 'channel' or 'tensor', got {self.granularity!r}")

    def compress(
        self, theta: Mapping[str, Encoded], targets: Sequence[Target]
    ) -> dict[str, Encoded]:
        """Round each tensor to its type."""
        require_finite({t.name: theta[t.name].codes for t in targets})
        return {t.name: self._quantize(t, theta[t.name]) for t in targets}

    def _quantize(self, target: Target, encoded: Encoded) -> Encoded:
        assert isinstance(self.dtype, str)
        if self.dtype in FLOATS:
            dtype = FLOATS[self.dtype]
            return encoded.replace(codes=elementwise(lambda w: cast(w, dtype), encoded.codes))
        weight = local(encoded.codes)
        channels = {target.channel_dim} if self.granularity == "channel" else set()
        rows = self._rows(target, weight)
        levels = LEVELS[self.dtype]
        within = Ranks.cutting(encoded.codes, set(range(weight.dim())) - channels)
        scale = symmetric_scale(rows, levels, ranks=within)
        codes = self._unrows(target, integer_codes(rows, scale, levels), weight.shape)
        return encoded.replace(
            codes=like(codes, encoded.codes),
            scale=shrunk(self._broadcastable(target, scale), encoded.codes, channels),
        )

    def _rows(self, target: Target, weight: Tensor) -> Tensor:
        if self.granularity == "tensor":
            return weight.reshape(1, -1)
        return weight.movedim(target.channel_dim, 0).flatten(1)

    def _unrows(self, target: Target, codes: Tensor, shape: torch.Size) -> Tensor:
        if self.granularity == "tensor":
            return codes.reshape(shape)
        first = torch.empty(shape, device="meta").movedim(target.channel_dim, 0).shape
        return codes.reshape(first).movedim(0, target.channel_dim).contiguous()

    def _broadcastable(self, target: Target, scale: Tensor) -> Tensor:
        shape = [1] * len(target.shape)
        if self.granularity == "channel":
            shape[target.channel_dim] = -1
        return scale.reshape(shape)
