"""Objectives by name, and from functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.objectives.base import CallableObjective, Direction, Objective
from lightning_condensa.objectives.several import Several
from lightning_condensa.objectives.size import FileSize, FLOPs, MemoryFootprint, Parameters
from lightning_condensa.objectives.timing import Latency, Throughput

__all__ = ["NAMED", "ObjectiveLike", "as_objective", "short_names"]

#: Objectives that need no argument; those that run the model take its ``example_input_array``.
NAMED: dict[str, Callable[[], Objective]] = {
    "memory": MemoryFootprint,
    "file_size": FileSize,
    "parameters": Parameters,
    "flops": FLOPs,
    "latency": Latency,
    "throughput": Throughput,
}


ObjectiveLike = str | Objective | Callable[[CompressedModel], float]


def short_names(objective: Objective) -> tuple[str, ...]:
    """What an objective may be called: its name, and the short one if it is of a named kind.

    Example:
        >>> short_names(MemoryFootprint())
        ('MemoryFootprint', 'memory')
    """
    return (objective.name, *(name for name, kind in NAMED.items() if type(objective) is kind))


def as_objective(
    objective: ObjectiveLike | Sequence[ObjectiveLike],
    direction: Direction | None = None,
) -> Objective:
    """An objective from what a user may pass.

    Args:
        objective: An objective, the name of one in `NAMED`, a callable, or several of these.
        direction: Of a callable.

    Raises:
        ValueError: If a name is unknown, a plain callable comes without a direction, or an
            objective with another direction than its own.

    Example:
        >>> as_objective("memory").unit
        'bytes'
    """
    if isinstance(objective, list | tuple):
        return Several([as_objective(part, _own(part, direction)) for part in objective])
    if isinstance(objective, str):
        if objective not in NAMED:
            raise ValueError(f"objective must be one of {sorted(NAMED)}, got {objective!r}")
        objective = NAMED[objective]()
    if isinstance(objective, Objective):
        if direction is not None and direction != objective.direction:
            raise ValueError(
                f"direction={direction!r} contradicts {objective.name}, which is "
                f"{objective.direction}imized"
            )
        return objective
    if not callable(objective):
        raise ValueError(
            "objective must be an Objective such as MemoryFootprint() or a callable "
            f"(CompressedModel) -> float, got {objective!r}"
        )
    if direction not in ("min", "max"):
        raise ValueError(
            "a callable objective needs direction='min' or direction='max', "
            f"got direction={direction!r}"
        )
    return CallableObjective(objective, direction)


def _own(part: ObjectiveLike, direction: Direction | None) -> Direction | None:
    """A direction is that of the callables among several objectives; the others have theirs."""
    return None if isinstance(part, str | Objective) else direction
