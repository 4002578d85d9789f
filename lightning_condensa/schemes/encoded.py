"""θ for one tensor: what a scheme keeps of it, and how to get it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_condensa.functional.bits import dtype_bits
from lightning_condensa.functional.placement import (
    broadcast_part,
    elementwise,
    placed,
    shrunk,
    where,
    whole,
)
from lightning_condensa.functional.ranks import count_nonzero


@dataclass(frozen=True, eq=False)
class Encoded:
    """A compressed tensor, ``Δ(θ) = codes · scale`` (Condensa's θ, arXiv:1911.02497 §4).

    The leaf of all encodings (:class:`~lightning_condensa.schemes.encoding.Encoding`).

    Tensors may be DTensors: then ``codes`` and ``mask`` are placed like the weight, ``scale`` is
    sharded with the output channels and replicated otherwise, and the counts are those of the whole
    tensor, to be asked for by all of its processes together.

    Attributes:
        codes: Values or integer codes, of the weight's own shape. Pruned elements are zero.
        dtype: Floating point type of the decoded weight.
        scale: ``None`` or a float32 tensor that broadcasts against ``codes``, group by group where
            there is a ``group``.
        mask: ``None`` (every element may be non-zero) or a boolean tensor of the weight's shape,
            true where the scheme lets an element live: the support that fine-tuning keeps.
        group: How many elements in a row share a scale, along dimensions in which ``scale`` has
            neither one nor as many as ``codes``; the last group may be smaller.
        bits: Bits of one stored value, where they are fewer than those of the type of ``codes``.
        table_bits: Bits of what decoding needs beside codes and scales, such as a codebook.
        boundaries: Where rounding turns from one value to the next, in terms of the scheme that
            found them in what it was to round, and keeps them; whole and not a DTensor. Decoding
            needs none.
        limits: Between which values, in units of the scale, training keeps the weight that was
            rounded to this (:meth:`bounded`): far beyond the codes it could never turn to others.
    """

    codes: Tensor
    dtype: torch.dtype
    scale: Tensor | None = None
    mask: Tensor | None = None
    group: int | None = None
    bits: int | None = None
    table_bits: int = 0
    boundaries: Tensor | None = None
    limits: tuple[float, float] | None = None

    @classmethod
    def dense(cls, weight: Tensor) -> Encoded:
        """The identity encoding: where every chain of projections starts."""
        return cls(codes=weight, dtype=weight.dtype)

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.codes.shape

    @property
    def terms(self) -> tuple[tuple[Encoded, ...], ...]:
        """Itself, as the only factor of the only term."""
        return ((self,),)

    @property
    def leaves(self) -> tuple[Encoded, ...]:
        """Itself."""
        return (self,)

    def rebuilt(self, leaves: Sequence[Encoded]) -> Encoded:
        """The one leaf that is given."""
        (leaf,) = leaves
        return leaf

    def replace(self, **changes: object) -> Encoded:
        """A copy with some attributes changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Encoded:
        """The encoding on another device."""
        tensors = {"codes": self.codes, "scale": self.scale, "mask": self.mask}
        moved = {k: None if t is None else t.to(device) for k, t in tensors.items()}
        return self.replace(**moved)

    def masked(self, mask: Tensor) -> Encoded:
        """The encoding with everything outside ``mask`` exactly zero.

        Args:
            mask: Boolean, of the weight's shape.
        """
        mask = placed(mask, self.codes)
        if self.mask is not None:
            mask = elementwise(torch.logical_and, mask, self.mask)
        return self.replace(codes=where(mask, self.codes), mask=mask)

    def whole(self) -> Encoded:
        """The encoding as plain tensors; of DTensors a collective call."""
        tensors = {"codes": self.codes, "scale": self.scale, "mask": self.mask}
        return self.replace(**{k: None if t is None else whole(t) for k, t in tensors.items()})

    def placed(self, reference: Tensor) -> Encoded:
        """Plain tensors, spread over processes as ``reference`` is."""
        mask = None if self.mask is None else placed(self.mask, reference)
        scale = self.scale
        if scale is not None:
            dims = [d for d, n in enumerate(scale.shape) if n > 1]
            scale = shrunk(broadcast_part(scale, reference), reference, dims)
        return self.replace(codes=placed(self.codes, reference), scale=scale, mask=mask)

    @property
    def value_bits(self) -> int:
        """Bits of one stored value."""
        return self.bits or dtype_bits(self.codes.dtype)

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return self.codes.numel()

    @property
    def nnz(self) -> int:
        """Non-zero elements: what a sparse file has to store."""
        return count_nonzero([self.codes])[0]

    @property
    def density(self) -> float:
        """Share of non-zero elements."""
        return self.nnz / max(self.numel, 1)

    @property
    def storage_bits(self) -> int:
        """The paper's count: surviving values, their scales and table, without positions."""
        return self.bits_of(self.nnz)

    def bits_of(self, nnz: int) -> int:
        """:attr:`storage_bits` of so many surviving values."""
        scale = 0 if self.scale is None else self.scale.numel() * dtype_bits(self.scale.dtype)
        return nnz * self.value_bits + scale + self.table_bits

    def decode(self) -> Tensor:
        """``Δ(θ)``: the dense weight, of type ``dtype``."""
        if self.scale is None:
            return self.codes.to(self.dtype)

        def product(codes: Tensor, scale: Tensor) -> Tensor:
            # In float32 first: a narrower product would round before the final type does. A zero
            # times a negative scale is -0.0, until it is added to 0.0.
            product = codes.to(torch.float32) * self._spread(scale, codes)
            return product.add_(0.0).to(self.dtype)

        return elementwise(product, self.codes, self.scale)

    def bounded(self, latent: Tensor) -> Tensor:
        """The nearest tensor between the :attr:`limits`, and zero; itself without any.

        Args:
            latent: Of the weight's shape, placed like ``codes``.
        """
        if self.limits is None:
            return latent
        low, high = min(self.limits[0], 0.0), max(self.limits[1], 0.0)
        if self.scale is None:
            return elementwise(lambda weight: weight.clamp(low, high), latent)

        def clamped(weight: Tensor, scale: Tensor) -> Tensor:
            ends = [end * self._spread(scale, weight).to(weight.dtype) for end in (low, high)]
            # A scale may be negative.
            return torch.minimum(torch.maximum(weight, torch.minimum(*ends)), torch.maximum(*ends))

        return elementwise(clamped, latent, self.scale)

    def _spread(self, scale: Tensor, codes: Tensor) -> Tensor:
        """The scale, so that it broadcasts against the codes."""
        if self.group is None:
            return scale
        for dim, (scales, extent) in enumerate(zip(scale.shape, codes.shape, strict=True)):
            if scales not in (1, extent):
                scale = scale.repeat_interleave(self.group, dim).narrow(dim, 0, extent)
        return scale
