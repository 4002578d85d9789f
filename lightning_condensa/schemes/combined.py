"""θ of a weight that is made of several tensors: factors, and terms of a sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain

import torch
from torch import Tensor

from lightning_condensa.functional.lowrank import ordered_product
from lightning_condensa.functional.placement import elementwise
from lightning_condensa.functional.ranks import count_nonzero
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.encoding import Encoding


@dataclass(frozen=True, eq=False)
class SumOfProducts:
    """``Δ(θ) = Σ leaf + Σ left @ right``: low rank, additive combinations, and both together.

    Everything is computed in double precision and rounded once, to the weight's type: products are
    summed up in the order of the inner dimension and terms from first to last, so that any machine
    gets the same bits.

    Factors are plain tensors. Leaves that are terms by themselves may be DTensors.

    Attributes:
        terms: Each one leaf of the weight's shape, or two factors ``(m, r)`` and ``(r, n)`` whose
            product has as many elements as the weight. At least two leaves in all.
        shape: Of the weight.

    Example:
        >>> left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
        >>> theta = SumOfProducts.product(Encoded.dense(left), Encoded.dense(right), (2, 2))
        >>> theta.decode(), theta.nnz
        (tensor([[3., 4.],
                [6., 8.]]), 4)
    """

    terms: tuple[tuple[Encoded, ...], ...]
    shape: torch.Size

    @classmethod
    def product(cls, left: Encoded, right: Encoded, shape: Sequence[int]) -> SumOfProducts:
        """``left @ right``, seen in the weight's shape."""
        return cls(((left, right),), torch.Size(shape))

    @classmethod
    def sum(cls, encodings: Sequence[Encoding]) -> Encoding:
        """The sum of encodings of one weight; one alone is its own sum."""
        terms = tuple(chain.from_iterable(e.terms for e in encodings))
        return combined(terms, encodings[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the decoded weight."""
        return self.terms[0][0].dtype

    @property
    def mask(self) -> Tensor | None:
        """``None``: where a factor or a term is zero, the weight need not be."""
        return None

    @property
    def leaves(self) -> tuple[Encoded, ...]:
        """Factors and terms from first to last."""
        return tuple(chain.from_iterable(self.terms))

    def rebuilt(self, leaves: Sequence[Encoded]) -> SumOfProducts:
        """The same expression with other leaves."""
        following = iter(leaves)
        terms = tuple(tuple(next(following) for _ in term) for term in self.terms)
        return replace(self, terms=terms)

    def to(self, device: torch.device) -> SumOfProducts:
        """The encoding on another device."""
        return self.rebuilt([leaf.to(device) for leaf in self.leaves])

    def whole(self) -> SumOfProducts:
        """The encoding as plain tensors; of DTensors a collective call."""
        return self.rebuilt([leaf.whole() for leaf in self.leaves])

    def placed(self, reference: Tensor) -> SumOfProducts:
        """Terms spread over processes as ``reference`` is; factors stay as they are."""
        terms = tuple(t if len(t) > 1 else (t[0].placed(reference),) for t in self.terms)
        return replace(self, terms=terms)

    @property
    def value_bits(self) -> int:
        """Bits of one stored value, of the widest leaf."""
        return max(leaf.value_bits for leaf in self.leaves)

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """Non-zero values in all leaves."""
        return sum(count_nonzero([leaf.codes for leaf in self.leaves]))

    @property
    def density(self) -> float:
        """Non-zero values for each element of the weight."""
        return self.nnz / max(self.numel, 1)

    @property
    def storage_bits(self) -> int:
        """The paper's count, summed over the leaves."""
        return sum(leaf.storage_bits for leaf in self.leaves)

    def decode(self) -> Tensor:
        """``Δ(θ)``: the dense weight."""

        def plus(total: Tensor, value: Tensor) -> Tensor:
            return elementwise(torch.add, total, value)

        return reduce(plus, map(self._decoded, self.terms)).to(self.dtype)

    def _decoded(self, term: tuple[Encoded, ...]) -> Tensor:
        """A term in double precision."""
        factors = [leaf.decode() for leaf in term]
        if len(factors) == 1:
            return factors[0].to(torch.float64)
        return ordered_product(*factors).view(self.shape)


def combined(terms: Sequence[tuple[Encoded, ...]], shape: Sequence[int]) -> Encoding:
    """The encoding with these terms: a single leaf is itself."""
    if len(terms) == 1 and len(terms[0]) == 1:
        return terms[0][0]
    return SumOfProducts(tuple(terms), torch.Size(shape))
