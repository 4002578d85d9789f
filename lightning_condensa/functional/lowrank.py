"""The nearest matrices of low rank, and how much rank each of several matrices should get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 17  # elements of a product that are summed up at a time, to stay in the cache


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a matrix, and its best approximation of every rank.

    Attributes:
        matrix: The matrix ``(m, n)``.
        vectors: Singular vectors of its smaller side as columns, ``(min(m, n), min(m, n))``, in
            double precision.
        values: Singular values, descending; exactly zero where they are within rounding of it.
    """

    matrix: Tensor
    vectors: Tensor
    values: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Spectrum:
        """By the eigenvectors of ``A Aᵀ`` or ``Aᵀ A``, whichever is smaller, in double precision.

        Right to about ``1e-8`` of the largest singular value, which is below the rounding of a
        float32 matrix. For one much wider than high it takes a fraction of the time of an SVD, for
        a square one about the same.

        Args:
            matrix: ``(m, n)``, any floating point type.

        Example:
            >>> Spectrum.of(torch.diag(torch.tensor([1.0, 3.0, 2.0]))).values
            tensor([3., 2., 1.], dtype=torch.float64)
        """
        wide = matrix.to(torch.float64)
        gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
        squares, vectors = torch.linalg.eigh(gram)
        values = squares.flip(0).clamp(min=0).sqrt()
        floor = torch.finfo(torch.float32).eps * values[:1]
        return cls(matrix, vectors.flip(1), values.where(values > floor, 0.0))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best approximation of a rank in the Frobenius norm (Eckart & Young 1936).

        Args:
            rank: From 1 to ``min(m, n)``.

        Returns:
            ``left`` ``(m, rank)`` and ``right`` ``(rank, n)`` in double precision, whose product it
            is. Each has the square roots of the singular values: neither overflows a narrow type,
            and rounding one does as much harm as rounding the other.

        Example:
            >>> left, right = Spectrum.of(torch.tensor([[4.0, 0.0], [0.0, 1.0]])).factors(1)
            >>> left @ right
            tensor([[4., 0.],
                    [0., 0.]], dtype=torch.float64)
        """
        roots = self.values[:rank].sqrt()
        inverse = torch.where(roots > 0, 1 / roots, 0.0)
        vectors, matrix = self.vectors[:, :rank], self.matrix.to(torch.float64)
        if matrix.shape[0] <= matrix.shape[1]:
            return vectors * roots, inverse[:, None] * (vectors.T @ matrix)
        return (matrix @ vectors) * inverse, roots[:, None] * vectors.T

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps a share of the squared singular values; at least 1.

        Args:
            energy: The share, in (0, 1].

        Example:
            >>> Spectrum.of(torch.diag(torch.tensor([3.0, 1.0, 1.0]))).rank_for(0.9)
            2
        """
        kept = self.values.square().cumsum(0)
        enough = kept >= energy * kept[-1:]
        return int(enough.to(torch.uint8).argmax()) + 1


def break_even(shape: tuple[int, int]) -> int:
    """The smallest rank whose factors take at least as many numbers as the matrix itself.

    Example:
        >>> break_even((4, 12)), break_even((1, 9))
        (3, 1)
    """
    rows, columns = shape
    return -(-rows * columns // (rows + columns))


def budget_ranks(
    values: Sequence[Tensor], shapes: Sequence[tuple[int, int]], budget: int
) -> list[int]:
    """Ranks that minimize the total squared error within a number of parameters.

    A rank r of an ``(m, n)`` matrix takes ``r (m + n)`` parameters, at most ``m n``: then it is
    kept as it is. Singular values are taken in the order of their square for each parameter that
    they cost. What is taken is optimal for what it costs until one does not fit any more; smaller
    ones may still do. (Idelbayev & Carreira-Perpiñán, "Low-rank compression of neural nets:
    learning the rank of each layer", CVPR 2020, where the penalty on parameters is a cost for each
    as it is here.)

    Args:
        values: Singular values of each matrix, descending.
        shapes: Their shapes.
        budget: Parameters in all.

    Returns:
        The rank of each, from 1 to its :func:`break_even`.

    Raises:
        ValueError: If the budget does not give each matrix a rank of 1.

    Example:
        >>> spectra = [torch.tensor([9.0, 1.0, 1.0]), torch.tensor([5.0, 4.0, 1.0])]
        >>> budget_ranks(spectra, [(8, 8), (8, 8)], 48)
        [1, 2]
    """
    ranks = [1] * len(shapes)
    left = budget - sum(_cost(shape, 1) for shape in shapes)
    if left < 0:
        raise ValueError(
            f"a rank of 1 for each matrix takes {budget - left} parameters, the budget is {budget}"
        )
    offers = [
        (-(float(value) ** 2) / sum(shape), index)
        for index, (spectrum, shape) in enumerate(zip(values, shapes, strict=True))
        for value in spectrum[1 : break_even(shape)].tolist()
        if value > 0
    ]
    for _, index in sorted(offers):
        shape, rank = shapes[index], ranks[index]
        cost = _cost(shape, rank + 1) - _cost(shape, rank)
        if cost <= left:
            ranks[index] += 1
            left -= cost
    return ranks


def _cost(shape: tuple[int, int], rank: int) -> int:
    rows, columns = shape
    return min(rank * (rows + columns), rows * columns)


def ordered_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` with the same bits on every machine.

    Each element is summed up in double precision from the first inner index to the last. Products
    of numbers of single precision or less are exact there, so nothing depends on how a library
    orders, blocks or fuses operations. Several times slower than a library's product, and still a
    fraction of the time that the factors take to find.

    Args:
        left: ``(m, r)``.
        right: ``(r, n)``.

    Returns:
        ``(m, n)``, float64.

    Example:
        >>> ordered_product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
        tensor([[11.]], dtype=torch.float64)
    """
    left, right = left.to(torch.float64), right.to(torch.float64)
    product = left.new_zeros(left.shape[0], right.shape[1])
    rows = max(_BLOCK // max(right.shape[1], 1), 1)
    for start in range(0, len(product), rows):
        block = product[start : start + rows]
        for column, row in zip(left[start : start + rows].unbind(1), right, strict=True):
            block.addcmul_(column[:, None], row[None])
    return product
