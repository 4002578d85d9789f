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

from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]


def l1(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    """Mean magnitude, ``Σ|w| / n``."""
    return magnitudes.sum(1) / sizes.squeeze(1)


def l2(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    """Root mean square, ``√(Σw² / n)``."""
    return magnitudes.square().sum(1).div(sizes.squeeze(1)).sqrt()


def maximum(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    """Largest magnitude."""
    return magnitudes.amax(1)


def minimum(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    """Smallest magnitude."""
    padding = sizes < magnitudes.shape[1]
    if bool(padding.any()):
        # Padding is zero: order descending and take the last real element.
        ordered = magnitudes.sort(1, descending=True).values
        return ordered.gather(1, sizes.long() - 1).squeeze(1)
    return magnitudes.amin(1)


def total(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    """Sum of magnitudes, not scaled by the group's size."""
    return magnitudes.sum(1)


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
