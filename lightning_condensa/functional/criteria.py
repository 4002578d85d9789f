"""How a group of weights is scored: one number per group from the magnitudes inside it.

A criterion takes the absolute values of the groups, ``(groups, size)``, and the number of real
elements of each group, ``(groups, 1)`` (blocks at a ragged edge hold fewer), and returns
``(groups,)``. ``l1`` and ``l2`` are averaged over the group, so that under one global threshold a
filter of 9 weights competes fairly with a filter of 4,608; inside one layer, where all groups have
the same size, keeping the largest ``l2`` is the nearest projection in the Frobenius norm.

``taylor`` stands for what the loss would feel if the group were zero, ``|Σ w·∂L/∂w|``, which L-C
measures while it trains (:class:`lightning_condensa.lc.effects.Effects`); where there are no
gradients, it is ``l2``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reduction:
    """A criterion that may be taken along one dimension of the groups after another.

    Zeros count nothing: groups may be padded with them.

    Attributes:
        each: What a weight counts.
        reduce: A sum or a maximum along one dimension.
        join: The same of two tensors, element by element.
        finish: The score from what is reduced and the number of elements, both ``(groups,)``.
    """

    each: Callable[[Tensor], Tensor]
    reduce: Callable[[Tensor, int], Tensor]
    join: Callable[[Tensor, Tensor], Tensor]
    finish: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, magnitudes: Tensor, sizes: Tensor) -> Tensor:
        """The scores of groups given as rows."""
        return self.finish(self.reduce(self.each(magnitudes), 1), sizes.squeeze(1))


#: Mean magnitude, ``Σ|w| / n``.
l1 = Reduction(torch.abs, torch.sum, torch.add, lambda total, n: total / n)
#: Root mean square, ``√(Σw² / n)``.
l2 = Reduction(torch.square, torch.sum, torch.add, lambda total, n: total.div(n).sqrt())
#: Largest magnitude.
maximum = Reduction(torch.abs, torch.amax, torch.maximum, lambda largest, n: largest)
#: Sum of magnitudes, not scaled by the group's size.
total = Reduction(torch.abs, torch.sum, torch.add, lambda total, n: total)


def minimum(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    """Smallest magnitude."""
    padding = sizes < magnitudes.shape[1]
    if bool(padding.any()):
        # Padding is zero: order descending and take the last real element.
        ordered = magnitudes.sort(1, descending=True).values
        return ordered.gather(1, sizes.long() - 1).squeeze(1)
    return magnitudes.amin(1)


CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "max": maximum,
    "mean": l1,
    "min": minimum,
    "sum": total,
    "taylor": l2,
}


def get_criterion(criterion: str | Criterion) -> Criterion:
    """Look a criterion up by name, or pass a callable through.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> get_criterion("l2") is l2
        True
    """
    if callable(criterion):
        return criterion
    if criterion not in CRITERIA:
        raise ValueError(
            f"criterion must be one of {sorted(CRITERIA)} or a callable, got {criterion!r}"
        )
    return CRITERIA[criterion]
