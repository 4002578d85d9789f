"""LowRank: ranks, budgets, storage, and what may come with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_condensa import (
    Choice,
    Codebook,
    Compose,
    LowRank,
    NeuronPrune,
    Prune,
    Quantize,
    Range,
    Scheme,
)
from lightning_condensa.schemes import SumOfProducts

from .networks import filled, linears, pi


def error(scheme: Scheme, module: nn.Module) -> float:
    decoded = {n: e.decode() for n, e in pi(scheme, module).items()}
    weights = {n: p.detach() for n, p in module.named_parameters()}
    return sum(float((weights[n] - w).square().sum()) for n, w in decoded.items())


def tail(weight: Tensor, rank: int) -> float:
    matrix = weight.detach().double().reshape(weight.shape[0], -1)
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(20, 12, bias=False),
        nn.Conv2d(6, 10, 3, bias=False),
        nn.Conv1d(4, 12, 3, groups=2, bias=False),
        nn.ConvTranspose2d(8, 6, 3, bias=False),
    ],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_the_nearest_of_its_rank_and_stores_its_factors(module: nn.Module, rank: int) -> None:
    filled(module)
    weight = module.get_parameter("weight")
    theta = pi(LowRank(rank=rank), module)["weight"]
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    assert error(LowRank(rank=rank), module) == pytest.approx(tail(weight, rank), rel=1e-5)
    assert theta.nnz == rank * (rows + columns)
    assert theta.storage_bits == 32 * theta.nnz
    assert theta.density == theta.nnz / weight.numel()
    assert theta.shape == weight.shape
    assert theta.mask is None
    matrix = theta.decode().reshape(rows, columns)
    assert torch.linalg.matrix_rank(matrix) == rank


def test_a_weight_that_factors_do_not_make_smaller_stays_as_it_is() -> None:
    module = filled(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 4)))
    theta = pi(LowRank(rank=4), module)
    assert isinstance(theta["0.weight"], SumOfProducts)
    assert torch.equal(theta["1.weight"].decode(), module.get_parameter("1.weight"))
    assert theta["1.weight"].nnz == 160


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.9])
def test_energy(energy: float) -> None:
    module = filled(linears(30, 20, 40))
    for name, encoded in pi(LowRank(energy=energy), module).items():
        weight = module.get_parameter(name)
        if isinstance(encoded, SumOfProducts):
            rank = encoded.leaves[0].shape[1]
            total = tail(weight, 0)
            assert tail(weight, rank) <= (1 - energy) * total < tail(weight, rank - 1)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(2, 30), min_size=3, max_size=5),
    st.floats(0.05, 1.0),
    st.integers(0, 99),
)
def test_a_density_is_never_exceeded(widths: list[int], density: float, seed: int) -> None:
    module = filled(linears(*widths), seed)
    elements = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    try:
        bound = LowRank(density=density).bind(module)
    except ValueError as refused:
        assert "is too small" in str(refused)
        least = sum(min(a + b, a * b) for a, b in pairwise(widths))
        assert least > density * elements
        return
    theta = bound.pi(dict(module.named_parameters()))
    assert sum(e.nnz for e in theta.values()) <= density * elements


def test_a_density_gives_rank_where_the_error_is() -> None:
    module = filled(linears(32, 32, 32))
    with torch.no_grad():
        module.get_parameter("1.weight").mul_(0.01)
    ranks = {n: e.leaves[0].shape[1] for n, e in pi(LowRank(density=0.5), module).items()}
    assert ranks == {"0.weight": 15, "1.weight": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    module = filled(nn.Linear(30, 20)).to(dtype)
    theta = pi(LowRank(rank=4), module)["weight"]
    assert {leaf.codes.dtype for leaf in theta.leaves} == {dtype}
    best = pi(LowRank(rank=4), module.double())["weight"].decode()
    assert (theta.decode() - best).norm() < 4 * torch.finfo(dtype).eps * best.norm() + 1e-6


def test_narrow_factors_do_not_overflow() -> None:
    weight = torch.full((64, 64), 3e4, dtype=torch.float16)
    bound = LowRank(rank=1).bind(nn.Linear(64, 64).half())
    decoded = bound.pi({"weight": weight})["weight"].decode()
    torch.testing.assert_close(decoded, weight, rtol=4e-3, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of rank, energy and density, got none"),
        ({"rank": 2, "density": 0.5}, r"got \['rank', 'density'\]"),
        ({"rank": 0}, "rank must be an int >= 1"),
        ({"rank": 2.0}, "rank must be an int >= 1"),
        ({"rank": True}, "rank must be an int >= 1"),
        ({"rank": Choice([4, 0])}, "rank must be an int >= 1"),
        ({"rank": Range(0.1, 4)}, "rank must be an int >= 1"),
        ({"energy": 1.5}, r"energy must be a number in \(0, 1\]"),
        ({"energy": float("nan")}, "energy must be"),
        ({"density": 0}, r"density must be a number in \(0, 1\]"),
        ({"density": Range(0.1, 2)}, "density must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRank(**arguments)  # type: ignore[arg-type]


def test_a_density_that_is_too_small_is_refused_when_bound() -> None:
    with pytest.raises(ValueError, match=r"density=0.1 is too small: a rank of 1 .* 20 parameters"):
        LowRank(density=0.1).bind(nn.Linear(10, 10))


def test_dimensions() -> None:
    scheme = LowRank(rank=Range(1, 64, log=True))
    assert list(scheme.space()) == ["rank"]
    assert scheme.at({"rank": 7.6}) == LowRank(rank=8)
    assert LowRank(energy=Range(0.5, 1.0)).at({"energy": 0.7}) == LowRank(energy=0.7)
    assert LowRank(density=Choice([0.1, 0.5])).at({"density": 0.1}) == LowRank(density=0.1)
    assert LowRank(rank=4, exclude="head").describe() == "LowRank(exclude=('head',), rank=4)"
    assert Scheme.from_yaml(scheme.to_yaml()) == scheme


@pytest.mark.parametrize("scheme", [LowRank(rank=2), LowRank(energy=0.4), LowRank(density=0.2)])
def test_the_ramp_leads_from_the_weight_to_the_scheme(scheme: LowRank) -> None:
    module = filled(linears(24, 20, 28))
    bound, weights = scheme.bind(module), {n: p.detach() for n, p in module.named_parameters()}

    def distance(progress: float) -> float:
        decoded = bound.relaxed(progress).pi(weights)
        return sum(float((weights[n] - e.decode()).norm()) ** 2 for n, e in decoded.items())

    distances = [distance(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert distances == sorted(distances)
    assert len(set(distances)) == 5
    assert distances[0] < 0.35 * distances[-1]
    assert distances[-1] == pytest.approx(error(scheme, module), rel=1e-5)


def test_rounding_after_it_rounds_the_factors() -> None:
    module = filled(nn.Conv2d(6, 10, 3))
    theta = pi(Compose([LowRank(rank=3), Quantize("int8")]), module)["weight"]
    left, right = theta.leaves
    assert left.codes.dtype == right.codes.dtype == torch.int8
    assert left.scale is not None
    assert right.scale is not None
    assert (left.scale.shape, right.scale.shape) == ((10, 1), (3, 1))
    assert theta.storage_bits == 8 * theta.nnz + 32 * 13
    exact = pi(LowRank(rank=3), module)["weight"].decode()
    assert (theta.decode() - exact).norm() < 0.01 * exact.norm()

    book = pi(Compose([LowRank(rank=3), Codebook(4, scope="global")]), module)["weight"]
    assert len(torch.cat([leaf.codes.flatten() for leaf in book.leaves]).unique()) == 4
    assert book.storage_bits == 2 * 3 * 64 + 4 * 32


@pytest.mark.parametrize(
    "stages",
    [
        [Prune(0.5), LowRank(rank=2)],
        [NeuronPrune(0.5), LowRank(rank=2)],
        [LowRank(rank=2), LowRank(rank=1)],
    ],
)
def test_nothing_but_rounding_goes_with_it(stages: list[Scheme]) -> None:
    with pytest.raises(ValueError, match=r"cannot both compress weight.*can only be rounded"):
        Compose(stages).bind(nn.Linear(8, 8))


def test_other_weights_may_be_pruned() -> None:
    module = filled(linears(12, 12, 12))
    theta = pi(Compose([Prune(0.25, include="1"), LowRank(rank=2, include="0")]), module)
    assert theta["0.weight"].nnz == 2 * 24
    assert theta["1.weight"].nnz == 36
    assert theta["1.weight"].mask is not None


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_weights_are_refused(alone: None) -> None:
    weight = distribute_tensor(torch.randn(8, 8), init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(ValueError, match="needs whole weights, weight is sharded"):
        LowRank(rank=2).bind(nn.Linear(8, 8)).pi({"weight": weight})


def test_factors_of_a_transposed_convolution_are_plain_matrices() -> None:
    module = filled(nn.ConvTranspose2d(8, 6, 3))
    for scheme in (Quantize("int8"), Quantize("int8", granularity="group:4")):
        theta = pi(Compose([LowRank(rank=3), scheme]), module)["weight"]
        scales = [tuple(leaf.scale.shape) for leaf in theta.leaves if leaf.scale is not None]
        assert scales == ([(8, 1), (3, 1)] if scheme.group is None else [(8, 1), (3, 14)])
