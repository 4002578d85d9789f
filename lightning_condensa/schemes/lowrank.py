"""Low rank: a weight as the product of two thin matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_condensa.functional.lowrank import Spectrum, break_even, budget_ranks
from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.combined import SumOfProducts
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.encoding import Encoding
from lightning_condensa.schemes.finite import require_finite
from lightning_condensa.schemes.prune import check_density
from lightning_condensa.schemes.selection import Target
from lightning_condensa.schemes.space import Choice, Range


@dataclass(frozen=True)
class LowRank(Scheme):
    """The nearest matrix of low rank, kept as two factors (Eckart & Young 1936).

    A weight of more than two dimensions is seen as a matrix of its first one by all the others: a
    convolution as filters by inputs times kernel. A rank r of an ``(m, n)`` matrix is stored as
    ``r (m + n)`` numbers of the weight's type. **A weight for which these would be as many as its
    own stays as it is.**

    Exactly one of the three is given:

    * ``rank``: the same for all, or less for a weight that has less.
    * ``energy``: for each weight the smallest rank that keeps this share of its squared singular
      values. It is judged anew at each projection: of a weight that has low rank already it may
      take another bit away.
    * ``density``: numbers stored, as a share of those of all selected weights together. The total
      squared error decides which weight gets how much rank, so that L-C learns it (Idelbayev &
      Carreira-Perpiñán, "Low-rank compression of neural nets: learning the rank of each layer",
      CVPR 2020).

    The singular vectors are found in double precision: a 2048 × 2048 weight takes seconds on one
    core, one with twice as many rows and columns eight times as long.

    Attributes:
        rank: At least 1, or a ``Choice`` or ``Range`` of such, which is rounded.
        energy: In (0, 1], or a search dimension.
        density: In (0, 1], or a search dimension.

    Example:
        >>> bound = LowRank(rank=1).bind(torch.nn.Linear(4, 4, bias=False))
        >>> theta = bound.pi({"weight": torch.outer(torch.arange(4.0), torch.ones(4))})["weight"]
        >>> theta.nnz, theta.decode()[3].round(decimals=4)
        (7, tensor([3., 3., 3., 3.]))
    """

    rank: int | Choice | Range | None = field(default=None, kw_only=True)
    energy: float | Choice | Range | None = field(default=None, kw_only=True)
    density: float | Choice | Range | None = field(default=None, kw_only=True)

    splits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [n for n in ("rank", "energy", "density") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"LowRank needs exactly one of rank, energy and density, got {given or 'none'}"
            )
        if self.rank is not None:
            _check_rank(self.rank)
        else:
            check_density(given[0], getattr(self, given[0]))

    @property
    def latent(self) -> bool:
        """Only with ``energy``: of a weight that is moved there, each C-step would take more."""
        return self.energy is not None

    @property
    def tolerance(self) -> float:
        """Rounding; a share of a weight that has low rank already where ``energy`` is given."""
        lost = 1 - self.energy if isinstance(self.energy, int | float) else 0.0
        return 1e-6 + math.sqrt(lost)

    def check(self, targets: Sequence[Target]) -> None:
        """Check that the budget, if there is one, gives every weight a rank of 1.

        Raises:
            ValueError: If it does not.
        """
        if self.density is not None:
            self._budgeted([torch.empty(0)] * len(targets), targets)

    def compress(
        self, theta: Mapping[str, Encoded], targets: Sequence[Target]
    ) -> dict[str, Encoding]:
        """Factor each weight.

        Raises:
            NotFiniteError: If a weight is not finite.
            ValueError: If a weight is sharded over processes.
        """
        for target in targets:
            if isinstance(theta[target.name].codes, DTensor):
                raise ValueError(
                    f"LowRank needs whole weights, {target.name} is sharded over processes: "
                    "leave it out with exclude="
                )
        require_finite({t.name: theta[t.name].codes for t in targets})
        spectra = [Spectrum.of(theta[t.name].decode().reshape(_matrix(t))) for t in targets]
        changed: dict[str, Encoding] = {}
        for target, spectrum, rank in zip(
            targets, spectra, self._ranks(spectra, targets), strict=True
        ):
            if rank >= break_even(_matrix(target)):
                changed[target.name] = theta[target.name]
                continue
            dtype = theta[target.name].dtype
            left, right = (Encoded.dense(f.to(dtype)) for f in spectrum.factors(rank))
            changed[target.name] = SumOfProducts.product(left, right, target.shape)
        return changed

    def _ranks(self, spectra: Sequence[Spectrum], targets: Sequence[Target]) -> list[int]:
        if isinstance(self.rank, int):
            return [min(self.rank, break_even(_matrix(t))) for t in targets]
        if isinstance(self.energy, int | float):
            return [spectrum.rank_for(self.energy) for spectrum in spectra]
        return self._budgeted([spectrum.values for spectrum in spectra], targets)

    def _budgeted(self, values: Sequence[Tensor], targets: Sequence[Target]) -> list[int]:
        assert isinstance(self.density, int | float)
        budget = math.floor(self.density * sum(math.prod(t.shape) for t in targets))
        try:
            return budget_ranks(values, [_matrix(t) for t in targets], budget)
        except ValueError as error:
            raise ValueError(f"density={self.density!r} is too small: {error}") from None

    def relaxed(self, progress: float) -> LowRank:
        """Density and energy part of the way down from 1, a rank from where it begins to save."""
        if isinstance(self.rank, int):
            return _Ramp(rank=self.rank, progress=progress, **self._selection)
        if isinstance(self.energy, int | float):
            return replace(self, energy=1 - (1 - self.energy) * progress)
        assert isinstance(self.density, int | float)
        return replace(self, density=1 - (1 - self.density) * progress)

    @property
    def _selection(self) -> dict[str, Any]:
        return {"include": self.include, "exclude": self.exclude, "types": self.types}

    def at(self, values: Mapping[str, Any]) -> LowRank:
        """The scheme with a value for its dimension; a rank is rounded."""
        if isinstance(self.rank, Range) and "rank" in values:
            values = {**values, "rank": round(values["rank"])}
        return super().at(values)


@dataclass(frozen=True)
class _Ramp(LowRank):
    """A rank part of the way down, geometrically."""

    progress: float = field(kw_only=True)

    def _ranks(self, spectra: Sequence[Spectrum], targets: Sequence[Target]) -> list[int]:
        final = super()._ranks(spectra, targets)
        starts = [break_even(_matrix(t)) for t in targets]
        return [round(b * (r / b) ** self.progress) for b, r in zip(starts, final, strict=True)]


def _matrix(target: Target) -> tuple[int, int]:
    """The shape of a weight seen as a matrix."""
    return target.shape[0], math.prod(target.shape[1:])


def _check_rank(rank: object) -> None:
    values: Sequence[object] = (rank,)
    if isinstance(rank, Range):
        values = (round(rank.low), round(rank.high))
    elif isinstance(rank, Choice):
        values = rank.options
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"rank must be an int >= 1, or a Range or Choice of such, got {rank!r}"
            )
