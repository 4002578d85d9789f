"""Several schemes side by side: a weight as the sum of what each makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_condensa.functional.norms import norm
from lightning_condensa.functional.placement import elementwise
from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.bound import staged
from lightning_condensa.schemes.combined import SumOfProducts
from lightning_condensa.schemes.compose import check_stages
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.encoding import Encoding
from lightning_condensa.schemes.finite import require_finite
from lightning_condensa.schemes.members import require_schemes, schemes_at, space_of
from lightning_condensa.schemes.selection import SelectionError, Skipped, Target
from lightning_condensa.schemes.space import Dimension

#: Share of the squared error by which a sweep must lower it for another one to follow.
_WORTH_IT = 1e-3

#: At most 0.06 on the layers of :mod:`lightning_condensa.testing` for low rank with corrections;
#: 0.33 for two matrices of signs with an outlier, which they cannot express.
_TOLERANCE = 0.35


@dataclass(frozen=True)
class Add(Scheme):
    """``Δ(θ) = Δ₁(θ₁) + Δ₂(θ₂) + …``: what one scheme misses is left to the others.

    A low-rank matrix and a sparse one, a codebook and corrections of what fits it worst, or several
    binary matrices (Idelbayev & Carreira-Perpiñán, "More general and effective model compression
    via an additive combination of compressions", ECML 2021). Π alternates over the schemes,

        θᵢ ← Πᵢ(w − Σ_{j≠i} Δⱼ(θⱼ)),    from zero,

    as long as the squared error falls; no step may raise it. That finds a good sum, not always the
    best one, and of a weight that is such a sum already not always the same again. The first scheme
    has the first choice: where a few weights stand out, put the one that corrects them first.

    A ``Prune`` in here chooses what is corrected: the weight itself is not sparse, nothing is
    masked, and fine-tuning goes on with all of it.

    Attributes:
        schemes: At least one; all select the same weights. A :class:`Compose` may be one of them.
        sweeps: How many times Π goes over the schemes at most.

    Example:
        >>> from lightning_condensa import Codebook, Prune
        >>> bound = Add([Codebook(2), Prune(0.25)]).bind(nn.Linear(4, 1, bias=False))
        >>> bound.pi({"weight": torch.tensor([[1.0, -1.0, 1.0, 7.0]])})["weight"].decode()
        tensor([[ 1., -1.,  1.,  7.]])
    """

    schemes: Sequence[Scheme] = field(default=())
    sweeps: int = field(default=20, kw_only=True)

    splits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_schemes(self.schemes)
        object.__setattr__(self, "schemes", tuple(self.schemes))
        if self.include or self.exclude or self.types:
            raise ValueError("Add takes no include, exclude or types: give them to its schemes")
        if not isinstance(self.sweeps, int) or isinstance(self.sweeps, bool) or self.sweeps < 1:
            raise ValueError(f"sweeps must be an int >= 1, got {self.sweeps!r}")

    def select(self, module: nn.Module) -> list[Target]:
        """The weights that all of the schemes select.

        Raises:
            SelectionError: If they select different ones, or none.
        """
        members = [(s, s.select(module)) for scheme in self.schemes for s in scheme.stages]
        first, targets = members[0]
        for scheme, others in members[1:]:
            if differing := {t.name for t in targets} ^ {t.name for t in others}:
                raise SelectionError(
                    f"the schemes of Add must select the same weights, {type(first).__name__} and "
                    f"{type(scheme).__name__} differ in {', '.join(sorted(differing))}: give both "
                    "the same include, exclude and types"
                )
        return targets

    def skipped(self, module: nn.Module) -> list[Skipped]:
        """The parameters that the schemes leave alone, and why."""
        return self.schemes[0].skipped(module)

    def check(self, targets: Sequence[Target]) -> None:
        """Check every scheme, and that none changes anything but the weights.

        Raises:
            ValueError: If one cannot compress a weight, or would change biases.
        """
        names = {t.name for t in targets}
        for scheme in self.schemes:
            check_stages([(stage, targets) for stage in scheme.stages])
            for stage in scheme.stages:
                stage.check(targets)
                if getattr(stage, "coupled", False):
                    raise ValueError(
                        f"{type(stage).__name__} in Add cannot take out what another term keeps: "
                        "give it coupled=False"
                    )
                if others := sorted(set(stage.names(targets)) - names):
                    raise ValueError(
                        f"{type(stage).__name__} in Add would also prune {', '.join(others)}, "
                        "which are no part of the sum: give it prune_bias=False"
                    )

    def compress(
        self, theta: Mapping[str, Encoded], targets: Sequence[Target]
    ) -> dict[str, Encoding]:
        """Alternate over the schemes.

        Raises:
            NotFiniteError: If a weight is not finite.
        """
        require_finite({t.name: theta[t.name].codes for t in targets})
        weights = {t.name: theta[t.name].decode() for t in targets}
        found: list[dict[str, Encoding]] = []
        values: list[dict[str, Tensor]] = []
        error = math.inf
        for sweep in range(self.sweeps):
            before = error
            for index, scheme in enumerate(self.schemes):
                rest = _minus(weights, [v for i, v in enumerate(values) if i != index])
                term = _projected(scheme, rest, weights, targets)
                value = {name: e.decode() for name, e in term.items()}
                distance = norm(_minus(rest, [value]).values())
                if sweep == 0:
                    found.append(term)
                    values.append(value)
                elif distance < error:
                    found[index], values[index] = term, value
                else:
                    continue
                error = distance
            if len(self.schemes) == 1 or error >= (1 - _WORTH_IT) * before:
                break
        return {name: SumOfProducts.sum([term[name] for term in found]) for name in weights}

    @property
    def quantizes(self) -> bool:
        """Whether one of the schemes rounds."""
        return any(stage.quantizes for scheme in self.schemes for stage in scheme.stages)

    @property
    def latent(self) -> bool:
        """Whether one of the schemes is."""
        return any(stage.latent for scheme in self.schemes for stage in scheme.stages)

    @property
    def tolerance(self) -> float:
        """What another alternation from zero may find of a weight that is such a sum."""
        return _TOLERANCE if len(self.schemes) > 1 else self.schemes[0].tolerance

    def structure(self, targets: Sequence[Target]) -> object:
        """What each scheme makes of the weights."""
        stages = [stage for scheme in self.schemes for stage in scheme.stages]
        return type(self), self.sweeps, tuple(s.structure(targets) for s in stages)

    def relaxed(self, progress: float) -> Add:
        """Every scheme part of the way."""
        return replace(self, schemes=[scheme.relaxed(progress) for scheme in self.schemes])

    def space(self) -> dict[str, Dimension]:
        """The open dimensions of all schemes, as ``scheme.dimension``."""
        return space_of(self.schemes)

    def at(self, values: Mapping[str, Any]) -> Add:
        """The sum with values for some dimensions."""
        self.check_dimensions(values)
        return replace(self, schemes=schemes_at(self.schemes, values))

    def describe(self) -> str:
        """One line for people: the terms of the sum."""
        return " + ".join(
            f"({scheme.describe()})" if len(scheme.stages) > 1 else scheme.describe()
            for scheme in self.schemes
        )


def _projected(
    scheme: Scheme,
    weights: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
    targets: Sequence[Target],
) -> dict[str, Encoding]:
    """Π of one scheme, for weights of the types of ``like``."""
    theta: dict[str, Encoding] = {
        name: Encoded.dense(weight.to(like[name].dtype)) for name, weight in weights.items()
    }
    for stage in scheme.stages:
        theta.update(staged(stage, targets, theta))
    return theta


def _minus(
    weights: Mapping[str, Tensor], values: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Weights less all of some values, in double precision: squares of any float32 fit there."""
    result = {}
    for name, weight in weights.items():
        result[name] = weight.to(torch.float64)
        for value in values:
            result[name] = elementwise(torch.sub, result[name], value[name])
    return result
