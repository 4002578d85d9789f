"""θ of one tensor, whatever it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_condensa.schemes.encoded import Encoded


class Encoding(Protocol):
    """A compressed tensor, made of one leaf or several (Condensa's θ, arXiv:1911.02497 §4).

    A leaf (:class:`~lightning_condensa.schemes.Encoded`) is a tensor of codes; a weight may also be
    a sum of products of leaves (:class:`~lightning_condensa.schemes.SumOfProducts`). Whoever
    stores, counts or rounds does so leaf by leaf, and :meth:`rebuilt` puts them together again.
    """

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the decoded weight."""
        ...

    @property
    def mask(self) -> Tensor | None:
        """The support that fine-tuning keeps: boolean, true where an element may live.

        ``None`` where every element of the weight may be non-zero.
        """
        ...

    @property
    def terms(self) -> tuple[tuple[Encoded, ...], ...]:
        """Summands, each of one leaf or of two that are factors."""
        ...

    @property
    def leaves(self) -> tuple[Encoded, ...]:
        """The tensors that it is made of, in a fixed order."""
        ...

    def rebuilt(self, leaves: Sequence[Encoded]) -> Encoding:
        """The same expression with other leaves, in the order of :attr:`leaves`."""
        ...

    def to(self, device: torch.device) -> Encoding:
        """The encoding on another device."""
        ...

    def whole(self) -> Encoding:
        """The encoding as plain tensors; of DTensors a collective call."""
        ...

    def placed(self, reference: Tensor) -> Encoding:
        """Plain tensors, spread over processes as ``reference`` is."""
        ...

    @property
    def value_bits(self) -> int:
        """Bits of one stored value; of the widest where leaves differ."""
        ...

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        ...

    @property
    def nnz(self) -> int:
        """Non-zero values in all leaves: what a sparse file has to store."""
        ...

    @property
    def density(self) -> float:
        """Non-zero values for each element of the weight."""
        ...

    @property
    def storage_bits(self) -> int:
        """The paper's count: surviving values, their scales and tables, without positions."""
        ...

    def decode(self) -> Tensor:
        """``Δ(θ)``: the dense weight, of type :attr:`dtype`."""
        ...
