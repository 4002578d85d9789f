"""Several schemes, one after the other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn

from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.bound import QUANTIZE, BoundScheme
from lightning_condensa.schemes.selection import Skipped
from lightning_condensa.schemes.space import Dimension


@dataclass(frozen=True)
class Compose(Scheme):
    """Π from left to right, Δ from right to left.

    The order is checked when built: prune, then project values, then quantize, because a later
    prune would have to compare codes of different scales.

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
        given = self.schemes
        if not isinstance(given, Sequence) or not given:
            raise ValueError(f"schemes must be a non-empty list of schemes, got {given!r}")
        for scheme in given:
            if not isinstance(scheme, Scheme):
                raise ValueError(f"schemes must hold schemes, got {scheme!r}")
        if self.include or self.exclude or self.types:
            raise ValueError("Compose takes no include, exclude or types: give them to its schemes")
        flat = tuple(stage for scheme in given for stage in scheme.stages)
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

    def bind(self, module: nn.Module) -> BoundScheme:
        """Resolve every stage against a module.

        Raises:
            ValueError: As for a single scheme, and if two stages quantize the same weight.
        """
        try:
            bound = super().bind(module)
        except ValueError as error:
            raise self._with_stage(error, module) from error
        uses = Counter(t.name for s, ts in bound.stages if s.order == QUANTIZE for t in ts)
        if twice := [name for name, count in uses.items() if count > 1]:
            by = [s.describe() for s, ts in bound.stages if twice[0] in {t.name for t in ts}]
            raise ValueError(
                f"{', '.join(twice)} would be quantized twice, in {' → '.join(by)}: "
                "select different weights with include= or exclude="
            )
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

    def skipped(self, module: nn.Module) -> list[Skipped]:
        """The parameters that no stage compresses, with the reasons of each."""
        reasons: dict[str, list[str]] = {}
        for stage in self.stages:
            for skip in stage.skipped(module):
                reasons.setdefault(skip.name, []).append(skip.reason)
        everywhere = {n: r for n, r in reasons.items() if len(r) == len(self.stages)}
        return [Skipped(n, "; ".join(dict.fromkeys(r))) for n, r in everywhere.items()]

    def _stage_names(self) -> list[str]:
        """``prune``, ``quantize``, … with ``_2`` and so on where a class repeats."""
        counts: Counter[str] = Counter()
        names = []
        for stage in self.stages:
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(stage).__name__).lower()
            counts[name] += 1
            names.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
        return names

    def space(self) -> dict[str, Dimension]:
        """The open dimensions of all stages, as ``stage.dimension``."""
        return {
            f"{name}.{dimension}": value
            for name, stage in zip(self._stage_names(), self.stages, strict=True)
            for dimension, value in stage.space().items()
        }

    def at(self, values: Mapping[str, Any]) -> Compose:
        """The composition with values for some dimensions."""
        self.check_dimensions(values)
        stages = []
        for name, stage in zip(self._stage_names(), self.stages, strict=True):
            own = {d: values[f"{name}.{d}"] for d in stage.space() if f"{name}.{d}" in values}
            stages.append(stage.at(own))
        return Compose(stages)

    def relaxed(self, progress: float) -> Compose:
        """Every stage part of the way."""
        return Compose([stage.relaxed(progress) for stage in self.stages])

    def describe(self) -> str:
        """One line for people: the stages in order."""
        return " → ".join(stage.describe() for stage in self.stages)
