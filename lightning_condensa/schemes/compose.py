"""Several schemes, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn

from lightning_condensa.graph import ChannelGraph
from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.bound import QUANTIZE, BoundScheme
from lightning_condensa.schemes.members import require_schemes, schemes_at, space_of
from lightning_condensa.schemes.selection import Skipped, Target
from lightning_condensa.schemes.space import Dimension

#: Π makes other factors of a product of rounded ones, and rounds those: int4 moves it by 0.1.
_ROUNDED_PARTS = 0.15


@dataclass(frozen=True)
class Compose(Scheme):
    """Π from left to right, Δ from right to left.

    The order is checked when built: prune, then project values, then quantize, because a later
    prune would have to compare codes of different scales. Rounding after :class:`LowRank` or
    :class:`Add` rounds each factor and term by itself.

    Attributes:
        schemes: At least one scheme; compositions inside are flattened.

    Example:
        >>> from lightning_condensa import Prune, Quantize
        >>> Compose([Prune(0.1), Quantize("float16")]).stages[1].dtype
        'float16'
    """

    schemes: Sequence[Scheme] = field(default=())

    def __post_init__(self) -> None:
        super().__post_init__()
        require_schemes(self.schemes)
        if self.include or self.exclude or self.types:
            raise ValueError("Compose takes no include, exclude or types: give them to its schemes")
        flat = tuple(stage for scheme in self.schemes for stage in scheme.stages)
        object.__setattr__(self, "schemes", flat)
        for before, after in pairwise(flat):
            if before.order > after.order:
                raise ValueError(
                    f"{type(after).__name__} must come before {type(before).__name__}: "
                    "the order is prune, then project values, then quantize"
                )

    @property
    def stages(self) -> tuple[Scheme, ...]:
        """The schemes."""
        return tuple(self.schemes)

    def trace(self, module: nn.Module) -> ChannelGraph:
        """The channels of a module, where a stage has a use for them."""
        graphs = (stage.trace(module) for stage in self.stages)
        return next((graph for graph in graphs if graph.definitions), ChannelGraph())

    def bind(self, module: nn.Module, graph: ChannelGraph | None = None) -> BoundScheme:
        """Resolve every stage against a module.

        Args:
            module: The module.
            graph: What :meth:`trace` found in it, where that is known.

        Raises:
            ValueError: As for a single scheme, if two stages quantize the same weight, or if one
                splits a weight that another does not only round.
        """
        try:
            bound = super().bind(module, graph)
        except ValueError as error:
            raise self._with_stage(error, module) from error
        check_stages(bound.stages)
        return bound

    def _with_stage(self, error: ValueError, module: nn.Module) -> ValueError:
        """The error with the stage that raises it; as it is where that is none alone."""
        for stage in self.stages:
            try:
                if not self.space():
                    stage.bind(module)
            except ValueError as own:
                return type(own)(f"{stage.describe()}: {own}")
        return error

    @property
    def tolerance(self) -> float:
        """The largest of the stages; where parts are rounded, the share that is new each time."""
        tolerances = [stage.tolerance for stage in self.stages]
        splits = any(stage.splits for stage in self.stages)
        rounds = any(stage.quantizes for stage in self.stages)
        return max(*tolerances, _ROUNDED_PARTS if splits and rounds else 0.0)

    def skipped(self, module: nn.Module) -> list[Skipped]:
        """The parameters that no stage compresses, with the reasons of each."""
        reasons: dict[str, list[str]] = {}
        for stage in self.stages:
            for skip in stage.skipped(module):
                reasons.setdefault(skip.name, []).append(skip.reason)
        everywhere = {n: r for n, r in reasons.items() if len(r) == len(self.stages)}
        return [Skipped(n, "; ".join(dict.fromkeys(r))) for n, r in everywhere.items()]

    def held(self, module: nn.Module) -> list[Skipped]:
        """Selected weights that a stage cannot treat in full, and why."""
        return [held for stage in self.stages for held in stage.held(module)]

    def space(self) -> dict[str, Dimension]:
        """The open dimensions of all stages, as ``stage.dimension``."""
        return space_of(self.stages)

    def at(self, values: Mapping[str, Any]) -> Compose:
        """The composition with values for some dimensions."""
        self.check_dimensions(values)
        return Compose(schemes_at(self.stages, values))

    def relaxed(self, progress: float) -> Compose:
        """Every stage part of the way."""
        return Compose([stage.relaxed(progress) for stage in self.stages])

    def describe(self) -> str:
        """One line for people: the stages in order."""
        return " → ".join(stage.describe() for stage in self.stages)


def check_stages(stages: Sequence[tuple[Scheme, Sequence[Target]]]) -> None:
    """Check that stages, each with its targets, can follow one another.

    Raises:
        ValueError: If two quantize the same weight, or one splits a weight that another does not
            only round.
    """
    uses = Counter(t.name for stage, targets in stages if stage.quantizes for t in targets)
    if twice := [name for name, count in uses.items() if count > 1]:
        by = [s.describe() for s, targets in stages if twice[0] in {t.name for t in targets}]
        raise ValueError(
            f"{', '.join(twice)} would be quantized twice, in {' → '.join(by)}: "
            "select different weights with include= or exclude="
        )
    for i, (splitting, targets) in enumerate(stages):
        if not splitting.splits:
            continue
        for j, (stage, others) in enumerate(stages):
            shared = {t.name for t in targets} & set(stage.names(others))
            if i != j and shared and stage.order != QUANTIZE:
                raise ValueError(
                    f"{type(splitting).__name__} and {type(stage).__name__} cannot both compress "
                    f"{', '.join(sorted(shared))}: factors and terms can only be rounded. Select "
                    "different weights with include= or exclude=, or take the sum of both, Add"
                )
