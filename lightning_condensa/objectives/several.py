"""Several objectives that are measured together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.objectives.base import Objective

__all__ = ["Several"]


class Several(Objective):
    """The first of some objectives; its details hold the values of all.

    Args:
        objectives: Two or more, with names of their own.

    Raises:
        ValueError: If there are fewer, or two have the same name.

    Example:
        >>> from lightning_condensa.objectives import MemoryFootprint, Parameters
        >>> Several([MemoryFootprint(), Parameters()]).name
        'MemoryFootprint, Parameters'
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        names = [objective.name for objective in objectives]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"objective must be two or more of different names, got {names}")
        self.parts = tuple(objectives)
        self.direction = self.parts[0].direction  # type: ignore[misc]
        self.unit = self.parts[0].unit  # type: ignore[misc]

    def __call__(self, compressed: CompressedModel) -> float:
        """The first one's figure."""
        return self.parts[0](compressed)

    def details(self, compressed: CompressedModel) -> dict[str, Any]:
        """The first one's details, and under ``"objectives"`` the details of all by name."""
        every = {part.name: part.details(compressed) for part in self.parts}
        return {**every[self.parts[0].name], "objectives": every}

    def beside(self, dense: nn.Module, values: Mapping[str, float]) -> Several:
        """The same objectives, each told what it is for the uncompressed module."""
        return Several([part.beside(dense, values) for part in self.parts])

    @property
    def name(self) -> str:
        """The names of all."""
        return ", ".join(part.name for part in self.parts)
