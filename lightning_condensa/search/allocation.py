"""Which option each group takes when together they may not be larger than a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["allocate"]


def allocate(
    losses: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Sequence[float]],
    budget: float,
    cells: int = 10_000,
) -> dict[str, int]:
    """Least total loss within a budget of bytes: a multiple-choice knapsack.

    With losses measured one group at a time (a sensitivity scan) it allocates bits, densities or
    both. Dynamic programming over sizes in ``cells`` steps of the budget, each rounded up, so that
    the budget is kept; the loss is the least but for this rounding.

    Args:
        losses: For each group the loss of each of its options.
        sizes: For each group the size of each option, in the order of its losses.
        budget: Greatest total size.
        cells: Steps of the budget.

    Returns:
        The number of the option of each group.

    Raises:
        ValueError: If the groups differ, a number is not finite or a size negative, or even the
            smallest options exceed the budget.

    Example:
        >>> losses = {"first": [0.0, 0.010, 0.2], "last": [0.0, 0.001, 0.002]}
        >>> sizes = {"first": [16, 8, 4], "last": [16, 8, 4]}
        >>> allocate(losses, sizes, budget=20)
        {'first': 0, 'last': 2}
    """
    _check(losses, sizes, budget, cells)
    least = {group: min(own) for group, own in sizes.items()}
    spare = budget - sum(least.values())
    if spare < 0:
        raise ValueError(
            f"budget={budget:g} is less than the smallest options need, {sum(least.values()):g}"
        )
    unit = spare / cells if spare > 0 else 1.0
    best = np.zeros(cells + 1)  # least loss of the groups so far in at most so many steps
    taken = []
    for group, own in losses.items():
        above = [(size - least[group]) / unit for size in sizes[group]]
        steps = [cells + 1 if a > cells else math.ceil(a - 1e-9) for a in above]
        options = np.full((len(own), cells + 1), np.inf)
        for i, (loss, step) in enumerate(zip(own, steps, strict=True)):
            if step <= cells:
                options[i, step:] = best[: cells + 1 - step] + loss
        taken.append((group, steps, options.argmin(axis=0)))
        best = options.min(axis=0)
    left, chosen = cells, dict[str, int]()
    for group, steps, options in reversed(taken):
        chosen[group] = int(options[left])
        left -= steps[chosen[group]]
    return {group: chosen[group] for group in losses}


def _check(
    losses: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Sequence[float]],
    budget: float,
    cells: int,
) -> None:
    if losses.keys() != sizes.keys() or not losses:
        raise ValueError(
            f"losses and sizes must have the same groups, got {sorted(losses)} and {sorted(sizes)}"
        )
    for group in losses:
        if len(losses[group]) != len(sizes[group]) or not len(losses[group]):
            raise ValueError(
                f"{group!r} must have a loss and a size for each option, got "
                f"{len(losses[group])} and {len(sizes[group])}"
            )
        if not all(map(math.isfinite, losses[group])):
            raise ValueError(f"losses[{group!r}] must be finite, got {list(losses[group])}")
        if not all(math.isfinite(size) and size >= 0 for size in sizes[group]):
            raise ValueError(f"sizes[{group!r}] must be finite and >= 0, got {list(sizes[group])}")
    if not math.isfinite(budget):
        raise ValueError(f"budget must be finite, got {budget}")
    if not isinstance(cells, int) or cells < 1:
        raise ValueError(f"cells must be an int >= 1, got {cells!r}")
