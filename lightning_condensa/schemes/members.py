"""What schemes that are made of other schemes have in common: their search dimensions by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.space import Dimension


def names_of(schemes: Sequence[Scheme]) -> list[str]:
    """``prune``, ``low_rank``, … with ``_2`` and so on where a class repeats."""
    counts: Counter[str] = Counter()
    names = []
    for scheme in schemes:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(scheme).__name__).lower()
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return names


def space_of(schemes: Sequence[Scheme]) -> dict[str, Dimension]:
    """The open dimensions of all of them, as ``scheme.dimension``."""
    return {
        f"{name}.{dimension}": value
        for name, scheme in zip(names_of(schemes), schemes, strict=True)
        for dimension, value in scheme.space().items()
    }


def schemes_at(schemes: Sequence[Scheme], values: Mapping[str, Any]) -> list[Scheme]:
    """The schemes with values for some dimensions of :func:`space_of`."""
    result = []
    for name, scheme in zip(names_of(schemes), schemes, strict=True):
        own = {d: values[f"{name}.{d}"] for d in scheme.space() if f"{name}.{d}" in values}
        result.append(scheme.at(own))
    return result


def require_schemes(given: object) -> None:
    """Raise ``ValueError`` unless ``given`` is a non-empty list of schemes."""
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"schemes must be a non-empty list of schemes, got {given!r}")
    for scheme in given:
        if not isinstance(scheme, Scheme):
            raise ValueError(f"schemes must hold schemes, got {scheme!r}")
