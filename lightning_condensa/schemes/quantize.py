"""Uniform quantization to narrow floats and integers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_condensa.functional.grouping import Blocks, Rows
from lightning_condensa.functional.masks import numbers
from lightning_condensa.functional.placement import (
    broadcast_part,
    elementwise,
    like,
    local,
    placed,
    shrunk,
    where,
    whole,
)
from lightning_condensa.functional.quantization import (
    cast,
    float_codes,
    grid_scale,
    held_scale,
    integer_codes,
    mean_scale,
    power_scale,
    sign_codes,
    threshold_of,
)
from lightning_condensa.functional.ranks import Ranks
from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.bound import QUANTIZE
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.finite import require_finite
from lightning_condensa.schemes.selection import Target
from lightning_condensa.schemes.space import Choice

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SCALED_FLOATS = {"float8_e4m3fn": torch.float8_e4m3fn}
INTEGERS = {"int8": 8, "int4": 4, "int2": 2}
SIGNS = {"ternary": 2, "binary": 1}
_GRANULARITY = re.compile(r"channel|tensor|group:([1-9][0-9]*)")


@dataclass(frozen=True)
class Quantize(Scheme):
    """Store weights in a narrow type; what is pruned stays exactly zero.

    * ``"float16"``, ``"bfloat16"``: rounded to nearest.
    * ``"float8_e4m3fn"``: rounded to nearest, times a power of two.
    * ``"int8"``, ``"int4"``, ``"int2"``: a grid of integers times a scale that nearly minimizes the
      squared error. Symmetric, ``−(2^(b−1) − 1) … 2^(b−1) − 1``, or with one more code on one side.
    * ``"ternary"``: ``{−1, 0, 1}`` times such a scale. Given the boundaries of an earlier θ, and so
      for a symmetric ``"int2"``, weights keep their threshold, and the scale is the best for it.
    * ``"binary"``: the sign times the mean magnitude of what is not pruned (Rastegari et al. 2016,
      arXiv:1603.05279): the nearest, and a weight that is zero without being pruned gets a sign.

    Of a DTensor the scales and codes are those of the whole weight: where shards cut a row that
    shares a scale, its largest magnitude and its errors, in double precision, are summed up over
    the processes.

    Attributes:
        dtype: One of these names, or a ``Choice`` of them.
        granularity: Which weights share a scale: an output ``"channel"``, the whole ``"tensor"``,
            or ``"group:64"``, so many consecutive inputs of a channel (at each position of a
            convolution's kernel; the last group may be smaller).
        symmetric: Whether integers have as many codes below zero as above.

    Example:
        >>> bound = Quantize("int8").bind(torch.nn.Linear(3, 1, bias=False))
        >>> bound.pi({"weight": torch.tensor([[12.7, 0.0, -5.0]])})["weight"].codes
        tensor([[127,   0, -50]], dtype=torch.int8)
    """

    dtype: str | Choice = "float16"
    granularity: str = field(default="channel", kw_only=True)
    symmetric: bool = field(default=True, kw_only=True)

    order: ClassVar[int] = QUANTIZE

    def __post_init__(self) -> None:
        super().__post_init__()
        accepted = [*FLOATS, *SCALED_FLOATS, *INTEGERS, *SIGNS]
        options = self.dtype.options if isinstance(self.dtype, Choice) else (self.dtype,)
        for option in options:
            if option not in accepted:
                raise ValueError(f"dtype must be one of {accepted}, or a Choice, got {option!r}")
        if not isinstance(self.granularity, str) or not _GRANULARITY.fullmatch(self.granularity):
            raise ValueError(
                "granularity must be 'channel', 'tensor' or 'group:N' with N >= 1, "
                f"got {self.granularity!r}"
            )

    @property
    def group(self) -> int | None:
        """Inputs that share a scale, ``None`` where it is all of them."""
        found = _GRANULARITY.fullmatch(self.granularity)
        return int(found[1]) if found is not None and found[1] else None

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
        weight, view = local(encoded.codes), self._view(target)
        rows, sizes = view.split(weight)
        if encoded.mask is not None and self.dtype == "binary":
            mask = local(placed(encoded.mask, encoded.codes))
            sizes = view.split(numbers(mask, torch.float32))[0].sum(1, keepdim=True)
        ranks = self._cut(target, encoded.codes)
        boundaries = encoded.boundaries if self._has_threshold else None
        if boundaries is not None:
            own = broadcast_part(boundaries.to(rows.device), encoded.codes)
            codes, scale = held_scale(rows, own.reshape(-1, 1), ranks)
        else:
            codes, scale = self._round(rows, sizes, ranks)
        if self._has_threshold and boundaries is None:
            threshold = threshold_of(rows, scale, ranks)
            boundaries = whole(self._placed(threshold, target, view, encoded.codes))
        joined = like(view.join(codes, weight.shape), encoded.codes)
        if encoded.mask is not None:  # a sign is never zero
            joined = where(encoded.mask, joined)
        return encoded.replace(
            codes=joined,
            scale=self._placed(scale, target, view, encoded.codes),
            group=self.group,
            bits=(INTEGERS | SIGNS).get(self.dtype),
            boundaries=boundaries,
            limits=self._limits,
        )

    @property
    def _limits(self) -> tuple[float, float] | None:
        """One step beyond the codes on either side; ``None`` of floats."""
        assert isinstance(self.dtype, str)
        if self.dtype == "binary":
            return -3.0, 3.0
        if self.dtype in SCALED_FLOATS:
            return None
        low, high = self._grid
        return low - 1.0, high + 1.0

    @property
    def _grid(self) -> tuple[int, int]:
        """The least and the largest code of an integer type or a ternary one."""
        assert isinstance(self.dtype, str)
        high = 1 if self.dtype == "ternary" else 2 ** (INTEGERS[self.dtype] - 1) - 1
        return (-high if self.symmetric or self.dtype == "ternary" else -high - 1), high

    @property
    def _has_threshold(self) -> bool:
        """Whether its codes are −1, 0 and 1, so that one threshold decides between them."""
        return self.dtype == "ternary" or (self.dtype == "int2" and self.symmetric)

    def _placed(self, scales: Tensor, target: Target, view: Rows | Blocks, codes: Tensor) -> Tensor:
        """One number for each row of this process, placed to broadcast with the codes."""
        scales = scales.view(view.grid(local(codes).shape))
        if self.group is not None:
            return like(scales, codes, torch.Size(view.grid(codes.shape)))
        dims = {target.channel_dim} if self.granularity == "channel" else set()
        return shrunk(scales, codes, dims)

    def _round(self, rows: Tensor, sizes: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Codes, and scales ``(rows, 1)``, of rows that share a scale each."""
        assert isinstance(self.dtype, str)
        if self.dtype == "binary":
            return sign_codes(rows), mean_scale(rows, sizes, ranks)
        if self.dtype in SCALED_FLOATS:
            dtype = SCALED_FLOATS[self.dtype]
            scale = power_scale(rows, dtype, ranks)
            return float_codes(rows, scale, dtype), scale
        low, high = self._grid
        scale = grid_scale(rows, low, high, ranks)
        return integer_codes(rows, scale, low, high), scale

    def _view(self, target: Target) -> Rows | Blocks:
        """What shares a scale, as rows."""
        if self.group is None:
            return Rows(None if self.granularity == "tensor" else target.channel_dim)
        block = [1] * len(target.shape)
        block[1 - target.channel_dim] = self.group
        return Blocks(tuple(block))

    def _cut(self, target: Target, codes: Tensor) -> Ranks:
        """The processes among which what shares a scale is cut.

        Raises:
            ValueError: If they cut groups.
        """
        dims = set(range(codes.dim()))
        if self.granularity != "tensor":
            dims -= {target.channel_dim}
        if self.group is None:
            return Ranks.cutting(codes, dims)
        if Ranks.cutting(codes, {1 - target.channel_dim}).groups:
            raise ValueError(
                f"granularity={self.granularity!r} needs whole rows of inputs on each process, "
                f"{target.name} is sharded along them: use 'channel', or exclude it"
            )
        return Ranks()
