"""Quantization to a few values that fit the weights best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_condensa.functional.bits import dtype_bits
from lightning_condensa.functional.kmeans import cell_means, cells, kmeans_1d, middles
from lightning_condensa.functional.norms import norm
from lightning_condensa.functional.placement import elementwise, whole
from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.bound import QUANTIZE
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.finite import require_finite
from lightning_condensa.schemes.selection import Target
from lightning_condensa.schemes.space import Choice

MAX_ENTRIES = 256


@dataclass(frozen=True)
class Codebook(Scheme):
    """Replace each weight by the nearest of ``k`` values; what is pruned stays exactly zero.

    The values minimize the squared error: they are the optimal centroids of one-dimensional k-means
    (Han et al. 2016, arXiv:1510.00149; Carreira-Perpiñán & Idelbayev 2017, arXiv:1707.04319),
    exact for small tensors. A packed file stores ``log2 k`` bits for each weight that is kept.
    Given the boundaries of an earlier θ, weights stay apart there, and the values are their means.
    Boundaries spread as weights grow and shrink; the middle of them only shrinks.

    A DTensor is made whole on every process to find its values.

    Attributes:
        k: Entries of the codebook, 1 to 256, or a ``Choice`` of such.
        scope: ``"layer"``: a codebook for each tensor; ``"global"``: one for all.

    Example:
        >>> bound = Codebook(2).bind(torch.nn.Linear(4, 1, bias=False))
        >>> bound.pi({"weight": torch.tensor([[1.0, 3.0, -5.0, 2.0]])})["weight"].codes
        tensor([[ 2.,  2., -5.,  2.]])
    """

    k: int | Choice = 16
    scope: Literal["layer", "global"] = field(default="layer", kw_only=True)

    order: ClassVar[int] = QUANTIZE

    def __post_init__(self) -> None:
        super().__post_init__()
        options = self.k.options if isinstance(self.k, Choice) else (self.k,)
        for option in options:
            number = isinstance(option, int) and not isinstance(option, bool)
            if not number or not 1 <= option <= MAX_ENTRIES:
                raise ValueError(
                    f"k must be an int from 1 to {MAX_ENTRIES}, or a Choice of such, got {option!r}"
                )
        if self.scope not in ("layer", "global"):
            raise ValueError(f"scope must be 'layer' or 'global', got {self.scope!r}")

    def compress(
        self, theta: Mapping[str, Encoded], targets: Sequence[Target]
    ) -> dict[str, Encoded]:
        """Replace each weight by the nearest entry of its codebook."""
        require_finite({t.name: theta[t.name].codes for t in targets})
        if self.scope == "layer":
            return {t.name: self._rounded(theta[t.name], *self._book([t], theta)) for t in targets}
        book, borders, boundaries = self._book(targets, theta)
        changed = {t.name: self._rounded(theta[t.name], book, borders, boundaries) for t in targets}
        for target in targets[1:]:  # the table is stored once
            changed[target.name] = changed[target.name].replace(table_bits=0)
        return changed

    def _book(
        self, targets: Sequence[Target], theta: Mapping[str, Encoded]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The entries that fit what is kept of some tensors, and where one turns into the next.

        The boundaries are given as they are, and for an encoding with the root mean square behind
        them: only of ``k`` entries, as weights of fewer values would never get more.
        """
        assert isinstance(self.k, int)
        kept = []
        for encoded in (theta[t.name] for t in targets):
            values = whole(encoded.codes)
            kept.append(values.flatten() if encoded.mask is None else values[whole(encoded.mask)])
        values = torch.cat(kept)
        size = norm([values]) / math.sqrt(max(values.numel(), 1)) or 1.0
        held = theta[targets[0].name].boundaries
        if held is None:
            book = kmeans_1d(values, self.k)
            borders = middles(book)
            found = torch.cat([borders, borders.new_tensor([size])])
            return book, borders, found if len(book) == self.k else None
        borders = _resized(held.cpu(), size)
        return cell_means(values, borders), borders, held

    def _rounded(
        self, encoded: Encoded, book: Tensor, borders: Tensor, boundaries: Tensor | None
    ) -> Encoded:
        assert isinstance(self.k, int)
        if len(book) == 0:
            return encoded

        def replaced(values: Tensor) -> Tensor:
            entries = book.to(values.device, values.dtype)
            # A zero has one bit pattern.
            return entries[cells(values, borders).long()].add_(0.0)

        rounded = encoded.replace(codes=elementwise(replaced, encoded.codes))
        if encoded.mask is not None:
            rounded = rounded.masked(encoded.mask)
        return rounded.replace(
            bits=max((self.k - 1).bit_length(), 1),
            table_bits=self.k * dtype_bits(encoded.dtype),
            boundaries=boundaries,
            limits=_one_step_beyond(book),
        )


def _one_step_beyond(book: Tensor) -> tuple[float, float] | None:
    """Where the next entries would lie on either side; ``None`` of one entry."""
    if len(book) < 2:
        return None
    first, second, *_ = ends = book.tolist()
    return 2 * first - second, 2 * ends[-1] - ends[-2]


def _resized(held: Tensor, size: float) -> Tensor:
    """Boundaries of an earlier θ for weights of another root mean square.

    Their middle does not grow: what lies off zero in training are ever larger outliers on one side,
    after which a middle that grew with the size would run, until few weights are left there.

    Args:
        held: The boundaries, and behind them the root mean square of the weights at that time.
        size: The root mean square of the weights now.
    """
    borders, growth = held[:-1], size / float(held[-1])
    if len(borders) == 0:
        return borders
    middle = borders.mean()
    return middle * min(growth, 1.0) + (borders - middle) * growth
