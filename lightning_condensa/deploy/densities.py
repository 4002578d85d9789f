"""What was asked of pruned parameters, and what is left of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_condensa.schemes import BoundScheme, Encoding
from lightning_condensa.schemes.prune import DensityPrune
from lightning_condensa.schemes.slices import LinkedPrune

#: A layer that keeps less than this share of what was asked of all is nearly removed.
_COLLAPSED = 0.1
#: A pool that keeps less, or more, than this many times what was asked of it is reported.
_SPARSER, _DENSER = 0.5, 1.5


@dataclass(frozen=True)
class Kept:
    """Elements or groups of one parameter.

    Attributes:
        name: Its name; a scheme of several parameters goes by the first.
        kept: How many are not zero.
        total: How many there are.
    """

    name: str
    kept: int
    total: int


@dataclass(frozen=True)
class PoolRow:
    """Parameters that share a threshold.

    Attributes:
        scheme: Class name of the scheme.
        asked: The density asked for.
        layers: What is left of each parameter.
        floor: What every parameter keeps, whatever the threshold.
    """

    scheme: str
    asked: float
    layers: tuple[Kept, ...]
    floor: int

    @property
    def kept(self) -> int:
        """How many elements or groups are not zero."""
        return sum(layer.kept for layer in self.layers)

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(layer.total for layer in self.layers)

    @property
    def density(self) -> float:
        """The share that is left."""
        return self.kept / max(self.total, 1)

    @property
    def collapsed(self) -> tuple[Kept, ...]:
        """The parameters of which next to nothing is left, next to what others keep.

        They keep less than a tenth of their share, or less than half of it where it is
        ``min_per_layer`` that stands between them and nothing.
        """
        shares = [0.5 if layer.kept <= self.floor else _COLLAPSED for layer in self.layers]
        return tuple(
            layer
            for layer, share in zip(self.layers, shares, strict=True)
            if layer.kept < share * self.asked * layer.total
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should not go unnoticed."""
        texts = []
        if self.density < _SPARSER * self.asked:
            texts.append(
                f"{self.scheme} was asked for a density of {self.asked:.2%}, and {self.kept} of "
                f"{self.total} are left, {self.density:.2%}: the others were zero already, or "
                "became zero in a later stage"
            )
        elif self.density > _DENSER * self.asked:
            texts.append(
                f"{self.scheme} was asked for a density of {self.asked:.2%}, and {self.kept} of "
                f"{self.total} are left, {self.density:.2%}: take a smaller align, or leave small "
                "layers out with exclude="
            )
        elif self.collapsed:
            listed = ", ".join(f"{c.name} ({c.kept} of {c.total})" for c in self.collapsed)
            texts.append(
                f"{self.scheme}, asked for a density of {self.asked:.2%}, leaves next to nothing "
                f"of {listed}: raise min_per_layer, give scope='layer', or give them a density of "
                "their own with overrides="
            )
        return tuple(texts)


def kept_by_pool(bound: BoundScheme, theta: Mapping[str, Encoding]) -> tuple[PoolRow, ...]:
    """What each pruning stage of a scheme was asked for, and what is left.

    Args:
        bound: The scheme, resolved against the module.
        theta: Its θ; of DTensors a collective call.
    """
    leaves = {name: leaf for name, e in theta.items() for leaf in e.leaves}  # one of what is pruned
    rows = []
    for stage, targets in bound.stages:
        if isinstance(stage, DensityPrune | LinkedPrune):
            scheme = stage.scheme if isinstance(stage, LinkedPrune) else stage
            for pool in stage.pools(targets):
                layers = tuple(Kept(m.name, *stage.left(leaves, m)) for m in pool.members)
                name = type(scheme).__name__
                rows.append(PoolRow(name, pool.density, layers, scheme.min_per_layer))
    return tuple(rows)
