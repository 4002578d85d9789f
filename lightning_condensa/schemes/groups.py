"""One scheme for all becomes one for each group: search dimensions per layer, depth or pattern."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import nn

from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.compose import Compose
from lightning_condensa.schemes.prune import DensityPrune
from lightning_condensa.schemes.selection import SelectionError, check_pattern, shorten

By = Literal["layer", "depth"] | Sequence[str]


def per_group(scheme: Scheme, module: nn.Module, by: By = "layer", parts: int = 3) -> Scheme:
    r"""Give every group of weights search dimensions of its own.

    Stages without a :class:`Range` or :class:`Choice` stay as they are. A pruning scheme gets an
    override for each group; of others there is a copy for each. The result is an ordinary scheme,
    in YAML too.

    Args:
        scheme: A scheme with search dimensions, a composition too.
        module: The network.
        by: ``"layer"``, each weight by itself; ``"depth"``, first to last in ``parts`` groups of
            as many weights; or regular expressions over parameter names, first match wins, where
            weights that match none are a group too.
        parts: Number of groups by depth.

    Raises:
        ValueError: If there is nothing to search, a scheme has overrides already, or an argument
            is none of these.
        SelectionError: If a pattern matches no weight.

    Example:
        >>> from lightning_condensa import Prune, Range
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sorted(per_group(Prune(Range(0.1, 1.0)), net).space())
        ['density[^0\\.]', 'density[^2\\.]']
    """
    if not scheme.space():
        raise ValueError(f"the scheme {scheme.describe()} has no Range or Choice to give to groups")
    if isinstance(by, str) and by not in ("layer", "depth"):
        raise ValueError(f"by must be 'layer', 'depth' or a list of patterns, got {by!r}")
    if not isinstance(parts, int) or parts < 1:
        raise ValueError(f"parts must be an int >= 1, got {parts!r}")
    if not isinstance(by, str):
        for pattern in by:
            check_pattern("by", pattern)
    stages = [own for stage in scheme.stages for own in _split(stage, module, by, parts)]
    return stages[0] if len(stages) == 1 else Compose(stages)


def _split(stage: Scheme, module: nn.Module, by: By, parts: int) -> list[Scheme]:
    if not stage.space():
        return [stage]
    names = [target.name for target in stage.select(module)]
    groups = _groups(names, by, parts)
    if len(groups) < 2:
        return [stage]
    everything = [t.name for t in replace(stage, include=(), exclude=()).select(module)]
    patterns = [cover(group, set(everything) - set(group)) for group in groups]
    if not isinstance(stage, DensityPrune):
        return [replace(stage, include=(pattern,)) for pattern in patterns]
    if stage.overrides:
        raise ValueError(
            f"{stage.describe()} has overrides already: give these to the groups, or name the "
            "groups in overrides={pattern: Range(…)} yourself"
        )
    # No weight is left to the density for all: it is not a dimension any more.
    return [replace(stage, density=1.0, overrides=dict.fromkeys(patterns, stage.density))]


def _groups(names: Sequence[str], by: By, parts: int) -> list[list[str]]:
    """Names by group, empty groups left out."""
    if by == "layer":
        return [[name] for name in names]
    if by == "depth":
        places = [i * min(parts, len(names)) // len(names) for i in range(len(names))]
    else:
        places = [
            next((i for i, pattern in enumerate(by) if re.search(pattern, name)), len(by))
            for name in names
        ]
        for i, pattern in enumerate(by):
            if i not in places:
                raise SelectionError(
                    f"by={pattern!r} matches no weight (or an earlier pattern took them all); "
                    f"there are {shorten(names)}"
                )
    return [[n for n, p in zip(names, places, strict=True) if p == i] for i in sorted({*places})]


def cover(group: Sequence[str], others: set[str]) -> str:
    """A regular expression for the names of a group and none of the others, by short prefixes."""
    pieces: dict[str, None] = {}
    for name in group:
        words = name.split(".")
        prefixes = (".".join(words[:i]) + "." for i in range(1, len(words)))
        free = (p for p in prefixes if not any(other.startswith(p) for other in others))
        found = next(free, None)
        pieces[re.escape(name) + "$" if found is None else re.escape(found)] = None
    return f"^{next(iter(pieces))}" if len(pieces) == 1 else f"^(?:{'|'.join(pieces)})"
