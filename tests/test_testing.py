"""The contract suite: every scheme keeps every law, and each law catches who breaks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_condensa import (
    Add,
    BlockPrune,
    Codebook,
    Compose,
    FilterPrune,
    HeadPrune,
    HiddenPrune,
    LowRank,
    NeuronPrune,
    NMPrune,
    Prune,
    Quantize,
    Scheme,
)
from lightning_condensa.schemes import Encoded, Target
from lightning_condensa.schemes.bound import PRUNE
from lightning_condensa.testing import LAWS, LAYERS, NETWORKS, check_scheme


@dataclass(frozen=True)
class Clip(Scheme):
    """As a user would write it."""

    limit: float = 0.5

    def project(self, weight: Tensor) -> Tensor:
        return weight.clamp(-self.limit, self.limit)


SCHEMES: dict[str, Scheme] = {
    "prune": Prune(0.3),
    "prune by layer": Prune(0.3, scope="layer"),
    "neuron": NeuronPrune(0.5),
    "neuron, aligned": NeuronPrune(0.5, align=4, criterion="l1"),
    "filter": FilterPrune(0.5, criterion="max"),
    "neuron, coupled": NeuronPrune(0.5, coupled=True),
    "filter, coupled": FilterPrune(0.5, coupled=True),
    "filter without norms": FilterPrune(0.5, prune_norm=False),
    "block": BlockPrune(0.4, (4, 4)),
    "ragged block": BlockPrune(0.4, (5, 7)),
    "head": HeadPrune(0.5, criterion="l1"),
    "hidden unit": HiddenPrune(0.5),
    "n:m": NMPrune(2, 4),
    "float16": Quantize("float16"),
    "bfloat16": Quantize("bfloat16"),
    "float8": Quantize("float8_e4m3fn"),
    "int8": Quantize("int8"),
    "int8 by tensor": Quantize("int8", granularity="tensor"),
    "int4": Quantize("int4"),
    "int4, asymmetric": Quantize("int4", symmetric=False),
    "int4 by group": Quantize("int4", granularity="group:4"),
    "int2": Quantize("int2", symmetric=False),
    "ternary": Quantize("ternary"),
    "binary": Quantize("binary"),
    "binary by group": Quantize("binary", granularity="group:5"),
    "codebook": Codebook(4),
    "codebook, global": Codebook(16, scope="global"),
    "prune, codebook": Compose([Prune(0.3), Codebook(2)]),
    "prune, int8": Compose([Prune(0.3), Quantize("int8")]),
    "filter, ternary": Compose([FilterPrune(0.5), Quantize("ternary")]),
    "head, int8": Compose([HeadPrune(0.5), Quantize("int8")]),
    "hidden unit, int8": Compose([HiddenPrune(0.5, criterion="l1"), Quantize("int8")]),
    "low rank": LowRank(rank=2),
    "low rank by energy": LowRank(energy=0.8),
    "low rank by density": LowRank(density=0.5),
    "low rank, int8": Compose([LowRank(rank=2), Quantize("int8")]),
    "low rank, codebook": Compose([LowRank(rank=2), Codebook(16, scope="global")]),
    "low rank + sparse": Add([LowRank(rank=2), Prune(0.05)]),
    "low rank + sparse, int8": Compose([Add([LowRank(rank=2), Prune(0.05)]), Quantize("int8")]),
    "codebook + sparse": Add([Codebook(2), Prune(0.05)]),
    "signs + signs": Add([Quantize("binary"), Quantize("binary")]),
    "int8 low rank + sparse": Add([Compose([LowRank(rank=2), Quantize("int8")]), Prune(0.05)]),
    "mixed by layer": Compose(
        [Prune(0.5, overrides={"0": 0.8}), Quantize("int4", types=("Linear", "Conv2d"))]
    ),
}


#: Projections that take long.
SLOW = {"low rank + sparse, int8", "int8 low rank + sparse"}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SCHEMES]
)
def test_every_scheme_keeps_every_law(name: str, law: str) -> None:
    layers = NETWORKS if "coupled" in name else LAYERS
    assert check_scheme(SCHEMES[name], law, layers) > 0


@pytest.mark.parametrize("law", [law for law in LAWS if law != "configures"])
def test_a_users_scheme_keeps_them_too(law: str) -> None:
    check_scheme(Clip(0.5), law)


# -- each law can be broken ----------------------------------------------------------------------


@dataclass(frozen=True)
class Shrinks(Clip):
    def project(self, weight: Tensor) -> Tensor:
        return super().project(weight) * 0.9


@dataclass(frozen=True)
class Flattens(Clip):
    def project(self, weight: Tensor) -> Tensor:
        return super().project(weight).flatten()


@dataclass(frozen=True)
class InPlace(Clip):
    def project(self, weight: Tensor) -> Tensor:
        return weight.clamp_(-self.limit, self.limit)


@dataclass(frozen=True)
class Random(Clip):
    def project(self, weight: Tensor) -> Tensor:
        return super().project(weight) + torch.rand(())


@dataclass(frozen=True)
class Shifts(Clip):
    def compress(
        self, theta: Mapping[str, Encoded], targets: Sequence[Target]
    ) -> dict[str, Encoded]:
        return {t.name: theta[t.name].replace(codes=theta[t.name].codes + 1) for t in targets}


@dataclass(frozen=True)
class OneMore(Prune):
    def chosen(self, pool: Any, scores: list[Tensor]) -> list[Tensor]:
        masks = super().chosen(pool, scores)
        masks[0].view(-1)[masks[0].view(-1).logical_not().nonzero()[0]] = True
        return masks


@dataclass(frozen=True)
class Stingy(Quantize):
    def compress(
        self, theta: Mapping[str, Encoded], targets: Sequence[Target]
    ) -> dict[str, Encoded]:
        found = super().compress(theta, targets)
        return {n: e.replace(bits=1) for n, e in found.items()}


@dataclass(frozen=True)
class Swallows(Clip):
    def compress(
        self, theta: Mapping[str, Encoded], targets: Sequence[Target]
    ) -> dict[str, Encoded]:
        finite = {t.name: theta[t.name].codes.nan_to_num() for t in targets}
        return super().compress({n: Encoded.dense(w) for n, w in finite.items()}, targets)


@dataclass(frozen=True)
class Forgets(Clip):
    hidden: list[int] = field(default_factory=lambda: [0], compare=False)

    def to_config(self) -> dict[str, Any]:
        return Prune(0.5).to_config()


@dataclass(frozen=True)
class Overflows(Clip):
    def project(self, weight: Tensor) -> Tensor:
        return super().project(weight * 1e10 / 1e10) if weight.abs().max() < 1 else weight * 1e20


@dataclass(frozen=True)
class Leaks(Scheme):
    """Prunes in θ, and says nothing of it."""

    order = PRUNE

    def compress(
        self, theta: Mapping[str, Encoded], targets: Sequence[Target]
    ) -> dict[str, Encoded]:
        mask = torch.ones_like(theta[targets[0].name].codes, dtype=torch.bool)
        mask.view(-1)[0] = False
        return {targets[0].name: theta[targets[0].name].replace(mask=mask)}


BREAKERS: dict[str, list[Scheme]] = {
    "idempotent": [Shrinks(), Shifts()],
    "like the weight": [Flattens(), InPlace()],
    "deterministic": [Random()],
    "keeps zeros": [Shifts(), Leaks()],
    "exact density": [OneMore(0.3)],
    "counts its bits": [Stingy("int8")],
    "configures": [Forgets()],
    "survives extremes": [Overflows()],
    "refuses NaN": [Swallows()],
    "trains": [Random()],
}


@pytest.mark.parametrize(
    ("law", "scheme"),
    [(law, scheme) for law, schemes in BREAKERS.items() for scheme in schemes],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_a_law_catches_who_breaks_it(law: str, scheme: Scheme) -> None:
    with pytest.raises(AssertionError):
        check_scheme(scheme, law)


def test_the_error_names_the_scheme_and_the_layer() -> None:
    with pytest.raises(AssertionError, match=r"Shrinks\(limit=0.5\) on linear: .* differs"):
        check_scheme(Shrinks(), "idempotent")
    with pytest.raises(AssertionError, match="can compress none of lstm"):
        check_scheme(NeuronPrune(0.5), "saves", {"lstm": lambda: nn.LSTM(4, 4)})
