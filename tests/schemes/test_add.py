"""Add: alternation, what it finds, and what a sum means beside pruning."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_condensa import (
    Add,
    Codebook,
    Compose,
    FilterPrune,
    LowRank,
    NeuronPrune,
    Prune,
    Quantize,
    Range,
    Scheme,
)
from lightning_condensa.schemes import SelectionError, SumOfProducts

from .networks import filled, linears, pi


def squared_error(scheme: Scheme, module: nn.Module) -> float:
    weights = {n: p.detach().double() for n, p in module.named_parameters()}
    return sum(
        float((weights[n] - e.decode()).square().sum()) for n, e in pi(scheme, module).items()
    )


MEMBERS = st.sampled_from(
    [
        LowRank(rank=1),
        LowRank(rank=3),
        LowRank(energy=0.5),
        LowRank(density=0.6),
        Prune(0.1),
        Prune(0.3, scope="layer"),
        NeuronPrune(0.3, prune_bias=False),
        Codebook(2),
        Codebook(4, scope="global"),
        Quantize("binary"),
        Quantize("ternary", granularity="tensor"),
        Quantize("int2"),
        Compose([LowRank(rank=2), Quantize("int4")]),
        Compose([Prune(0.2), Codebook(2)]),
    ]
)


@settings(deadline=None, max_examples=30)
@given(st.lists(MEMBERS, min_size=1, max_size=3), st.integers(0, 999))
def test_the_squared_error_never_rises(members: list[Scheme], seed: int) -> None:
    module = filled(linears(10, 8, 12), seed)
    errors = [squared_error(Add(members, sweeps=n), module) for n in range(1, 6)]
    assert errors[0] <= squared_error(members[0], module) * (1 + 1e-6)
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-6)


@pytest.mark.parametrize(
    "members",
    [
        [LowRank(rank=3), Prune(0.1)],
        [Prune(0.1), LowRank(rank=3)],
        [Codebook(2), Prune(0.1)],
        [Quantize("binary"), Quantize("binary")],
    ],
)
def test_going_on_is_better_than_one_sweep(members: list[Scheme]) -> None:
    module = filled(linears(20, 30))
    first, last = (squared_error(Add(members, sweeps=n), module) for n in (1, 20))
    assert last < 0.99 * first
    assert first < min(squared_error(member, module) for member in members)


def test_it_finds_the_parts_of_a_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(30, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    sparse = torch.zeros(30, 40)
    places = torch.randperm(1200, generator=generator)[:24]
    sparse.view(-1)[places] = 20 * torch.randn(24, generator=generator).sign()
    bound = Add([Prune(24 / 1200), LowRank(rank=2)]).bind(nn.Linear(40, 30, bias=False))
    theta = bound.pi({"weight": low + sparse})["weight"]
    torch.testing.assert_close(theta.decode(), low + sparse, rtol=0, atol=1e-3)
    assert theta.nnz == 2 * 70 + 24
    torch.testing.assert_close(theta.leaves[0].decode(), sparse, rtol=0, atol=1e-3)


def test_a_codebook_need_not_fit_what_is_corrected() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 9.0, -1.0]])
    bound = Add([Prune(1 / 8), Codebook(2)]).bind(nn.Linear(8, 1, bias=False))
    theta = bound.pi({"weight": weight})
    torch.testing.assert_close(theta["weight"].decode(), weight)
    assert theta["weight"].storage_bits == 8 * 1 + 2 * 32 + 32


def test_one_budget_of_corrections_for_all_layers() -> None:
    module = filled(linears(10, 10, 10))
    with torch.no_grad():
        module.get_parameter("1.weight").mul_(0.01)
    theta = pi(Add([LowRank(rank=2), Prune(0.1)]), module)
    assert [theta[n].leaves[-1].nnz for n in ("0.weight", "1.weight")] == [19, 1]


def test_a_sum_is_no_pruning() -> None:
    scheme = Add([LowRank(rank=2), Prune(0.1)])
    module = filled(linears(10, 8))
    bound = scheme.bind(module)
    assert not bound.prunes
    assert bound.pruned == ()
    assert bound.moved == bound.names == ("0.weight",)
    assert bound.latent == ()
    theta = pi(scheme, module)["0.weight"]
    assert theta.mask is None
    assert theta.decode().count_nonzero() == 80
    assert theta.nnz == 2 * 18 + 8


def test_types_are_kept() -> None:
    module = filled(linears(16, 12)).to(torch.float16)
    theta = pi(Add([LowRank(rank=2), Prune(0.1)]), module)["0.weight"]
    assert theta.decode().dtype == torch.float16
    assert {leaf.codes.dtype for leaf in theta.leaves} == {torch.float16}


def test_rounding_after_it_rounds_every_part() -> None:
    module = filled(linears(16, 12))
    theta = pi(Compose([Add([LowRank(rank=2), Prune(0.1)]), Quantize("int8")]), module)["0.weight"]
    assert [leaf.codes.dtype for leaf in theta.leaves] == [torch.int8] * 3
    exact = pi(Add([LowRank(rank=2), Prune(0.1)]), module)["0.weight"]
    assert exact.nnz - 2 <= theta.nnz <= exact.nnz  # a few round to zero
    assert (theta.decode() - exact.decode()).norm() < 0.01 * exact.decode().norm()


def test_one_scheme_alone_is_itself() -> None:
    module = filled(linears(6, 6))
    alone, same = pi(Add([LowRank(rank=2)]), module), pi(LowRank(rank=2), module)
    assert torch.equal(alone["0.weight"].decode(), same["0.weight"].decode())
    pruned = pi(Add([Prune(0.5)]), module)["0.weight"]
    assert pruned.nnz == 18


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Add([]), "non-empty list"),
        (lambda: Add([3]), "must hold schemes, got 3"),
        (lambda: Add(Prune(0.1)), "non-empty list"),
        (lambda: Add([Prune(0.1)], include="x"), "Add takes no include"),
        (lambda: Add([Prune(0.1)], sweeps=0), "sweeps must be an int >= 1"),
        (lambda: Compose([Quantize("int8"), Add([Prune(0.1)])]), "Add must come before Quantize"),
        (lambda: Compose([Add([LowRank(rank=1)]), Prune(0.1)]), "Prune must come before Add"),
    ],
)
def test_bad_arguments(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Add([LowRank(rank=1), Prune(0.1, exclude="1")]), "LowRank and Prune differ in 1.weight"),
        (Add([Prune(0.5), NeuronPrune(0.5)]), "also prune 0.bias, 1.bias.*prune_bias=False"),
        (Compose([Prune(0.5), Add([LowRank(rank=1), Codebook(2)])]), "cannot both compress"),
        (Add([Compose([Prune(0.5), LowRank(rank=1)]), Codebook(2)]), "cannot both compress"),
        (Compose([Add([Codebook(2), Prune(0.1)]), Quantize("int8")]), "quantized twice"),
        (Add([LowRank(density=0.01), Prune(0.1)]), "density=0.01 is too small"),
        (Add([LowRank(rank=1), Prune(1e-4)]), "keeps 0 of 128"),
    ],
)
def test_what_cannot_be_bound(scheme: Scheme, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheme.bind(linears(8, 8, 8))


def test_layers_that_only_some_of_its_schemes_know() -> None:
    module = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(8, 8))
    with pytest.raises(SelectionError, match=r"LowRank and FilterPrune differ in 1\.weight"):
        Add([LowRank(rank=1), FilterPrune(0.5, prune_bias=False)]).bind(module)
    scheme = Add([LowRank(rank=1, types="Linear"), NeuronPrune(0.5, prune_bias=False)])
    assert scheme.bind(module).names == ("1.weight",)
    assert "0.weight" in {s.name for s in scheme.skipped(module)}


def test_dimensions_and_text() -> None:
    scheme = Add(
        [
            LowRank(rank=Range(1, 8)),
            Compose([Prune(Range(0.01, 0.1)), Quantize("int8")]),
        ],
        sweeps=5,
    )
    assert list(scheme.space()) == ["low_rank.rank", "compose.prune.density"]
    fixed = scheme.at({"low_rank.rank": 3.2, "compose.prune.density": 0.05})
    expected = Add([LowRank(rank=3), Compose([Prune(0.05), Quantize("int8")])], sweeps=5)
    assert fixed == expected
    assert Scheme.from_yaml(scheme.to_yaml()) == scheme
    assert fixed.describe() == "LowRank(rank=3) + (Prune(density=0.05) → Quantize(dtype='int8'))"
    inside = Compose([Add([LowRank(rank=Range(1, 8)), Prune(0.1)]), Quantize("int8")])
    assert list(inside.space()) == ["add.low_rank.rank"]


def test_the_ramp_relaxes_every_part() -> None:
    module = filled(linears(20, 16, 20))
    bound = Add([LowRank(rank=2), Prune(0.05)]).bind(module)
    weights: Mapping[str, Tensor] = {n: p.detach() for n, p in module.named_parameters()}
    distances = []
    for progress in (0.0, 0.5, 1.0):
        theta = bound.relaxed(progress).pi(weights)
        distances.append(sum(float((weights[n] - e.decode()).norm()) for n, e in theta.items()))
    assert distances[0] < 1e-4
    assert distances[0] < 0.5 * distances[1] < 0.5 * distances[2]


def test_what_does_the_same_is_the_same() -> None:
    module = linears(10, 10)
    structures = [
        Add([LowRank(rank=rank), Prune(density)]).bind(module).structure
        for rank, density in ((2, 0.1), (2, 0.1001), (3, 0.1))
    ]
    assert structures[0] == structures[1] != structures[2]


def test_leaves_can_be_exchanged() -> None:
    theta = pi(Add([LowRank(rank=2), Prune(0.1)]), filled(linears(10, 8)))["0.weight"]
    assert isinstance(theta, SumOfProducts)
    doubled = theta.rebuilt([leaf.replace(codes=2 * leaf.codes) for leaf in theta.leaves])
    low = theta.leaves[0].decode() @ theta.leaves[1].decode()
    expected = 4 * low + 2 * theta.leaves[2].decode()
    torch.testing.assert_close(doubled.decode(), expected)
