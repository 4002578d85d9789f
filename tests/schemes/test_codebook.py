"""Codebooks: nearest values, their number, pruned weights, files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_condensa import (
    Choice,
    Codebook,
    Compose,
    LowRank,
    Prune,
    Quantize,
    Scheme,
    load_compressed,
)
from lightning_condensa.deploy import CompressedModel
from lightning_condensa.schemes import NotFiniteError
from lightning_condensa.schemes.bound import boundaries_of

from .networks import filled, pi


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("k", [1, 2, 5, 16, 256])
def test_contract(k: int, scope: str, dtype: torch.dtype) -> None:
    module = filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(30, 40)).to(dtype))
    bound = Codebook(k, scope=scope).bind(module)  # type: ignore[arg-type]
    theta = bound.pi(dict(module.named_parameters()))
    values = [e.codes.unique() for e in theta.values()]
    assert all(0 < len(v) <= k for v in values)
    if scope == "global":
        assert len(torch.cat(values).unique()) <= k
    for name, encoded in theta.items():
        weight = module.get_parameter(name).detach()
        assert (encoded.codes.dtype, encoded.codes.shape) == (weight.dtype, weight.shape)
        book = torch.cat(values).unique() if scope == "global" else encoded.codes.unique()
        distance = (weight.double().flatten() - book.double()[:, None]).abs().amin(0)
        error = (encoded.decode().double() - weight.double()).abs().flatten()
        assert torch.all(error <= distance + 1e-6 + distance * torch.finfo(dtype).eps)
    decoded = bound.delta(theta)
    again = bound.delta(bound.pi(decoded))
    assert all(torch.equal(again[n], decoded[n]) for n in decoded)


def test_what_is_pruned_takes_no_entry() -> None:
    module = nn.Linear(6, 1, bias=False)
    module.weight.data = torch.tensor([[5.0, 0.1, -3.0, 0.2, 5.2, -3.4]])
    theta = pi(Compose([Prune(4 / 6), Codebook(2)]), module)["weight"]
    torch.testing.assert_close(theta.decode(), torch.tensor([[5.1, 0.0, -3.2, 0.0, 5.1, -3.2]]))
    assert theta.nnz == 4
    assert theta.storage_bits == 4 * 1 + 2 * 32


def test_more_entries_come_closer() -> None:
    module = filled(nn.Linear(50, 40))
    errors = [
        float((pi(Codebook(k), module)["weight"].decode() - module.weight).norm())
        for k in (1, 2, 4, 16, 64, 256)
    ]
    assert errors == sorted(errors, reverse=True)
    separate = filled(nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 9)))
    with torch.no_grad():
        separate[1].weight.mul_(10)

    def error(scheme: Scheme) -> float:
        theta = pi(scheme, separate)
        return sum(
            float((e.decode() - separate.get_parameter(n)).square().sum()) for n, e in theta.items()
        )

    assert error(Codebook(4)) < error(Codebook(4, scope="global"))


def test_a_global_table_counts_once() -> None:
    module = filled(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)))
    bits = [e.storage_bits for e in pi(Codebook(4, scope="global"), module).values()]
    assert sorted(bits) == [400 * 2, 400 * 2 + 4 * 32]


@pytest.mark.parametrize("k", [2, 16])
def test_files(tmp_path, k: int) -> None:  # type: ignore[no-untyped-def]
    module = filled(nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 3)))
    scheme = Compose([Prune(0.1), Codebook(k)])
    theta = pi(scheme, module)
    with torch.no_grad():
        for name, encoded in theta.items():
            module.get_parameter(name).copy_(encoded.decode())
    CompressedModel(module, theta, scheme).save(tmp_path / "m.condensa")
    entropy = 20_300 * 0.469 / 8 + 2_030 * (k - 1).bit_length() / 8  # positions and entries
    assert (tmp_path / "m.condensa").stat().st_size < 1.1 * entropy + 103 * 4 + 2 * k * 8 + 1200
    other = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 3))
    x = torch.randn(4, 200)
    assert torch.equal(load_compressed(tmp_path / "m.condensa", other)(x), module(x))
    assert Scheme.from_yaml(scheme.to_yaml()) == scheme


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be an int from 1 to 256"),
        ({"k": 257}, "got 257"),
        ({"k": 2.0}, "got 2.0"),
        ({"k": True}, "got True"),
        ({"k": Choice([4, 512])}, "got 512"),
        ({"k": 4, "scope": "row"}, "scope must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codebook(**arguments)  # type: ignore[arg-type]


def test_weights_that_are_not_finite() -> None:
    module = nn.Linear(3, 2)
    module.weight.data[1, 1] = torch.nan
    with pytest.raises(NotFiniteError):
        pi(Codebook(2), module)


def test_a_search_dimension() -> None:
    scheme = Codebook(Choice([2, 16]))
    assert list(scheme.space()) == ["k"]
    assert scheme.at({"k": 2}) == Codebook(2)


# -- boundaries that are kept ----------------------------------------------------------------------


def test_kept_boundaries_keep_weights_apart() -> None:
    # 0 is nearly as well off with −1 as with 1: a little makes the best codebook change sides.
    before, after = torch.tensor([[-1.0, 0.0, 1.01]]), torch.tensor([[-1.02, 0.0, 1.01]])
    bound = Codebook(2).bind(nn.Linear(3, 1, bias=False))
    theta = bound.pi({"weight": before})
    assert theta["weight"].decode().tolist() == [pytest.approx([-0.5, -0.5, 1.01])]
    anew = bound.pi({"weight": after})["weight"]
    assert anew.decode().tolist() == [pytest.approx([-1.02, 0.505, 0.505])]
    kept = bound.pi({"weight": after}, boundaries=boundaries_of(theta))["weight"]
    assert kept.decode().tolist() == [pytest.approx([-0.51, -0.51, 1.01])]
    assert (kept.bits, kept.table_bits) == (anew.bits, anew.table_bits)


def test_outliers_leave_the_middle_of_boundaries_where_it_was() -> None:
    before = torch.tensor([[-1.0, -0.8, -0.6, 0.2, 0.4]])
    bound = Codebook(2).bind(nn.Linear(5, 1, bias=False))
    kept = boundaries_of(bound.pi({"weight": before}))
    after = torch.tensor([[-8.0, -0.8, -0.6, 0.2, 0.4]])
    theta = bound.pi({"weight": after}, boundaries=kept)["weight"].decode()
    assert theta.tolist() == [pytest.approx([-9.4 / 3] * 3 + [0.3] * 2)]


def test_boundaries_spread_as_the_weights_grow() -> None:
    weights = torch.tensor([[-2.0, -1.0, 1.0, 2.0, -2.0, -1.0, 1.0, 2.0]])
    bound = Codebook(4).bind(nn.Linear(8, 1, bias=False))
    kept = boundaries_of(bound.pi({"weight": weights}))
    theta = bound.pi({"weight": 10 * weights}, boundaries=kept)["weight"]
    assert torch.equal(theta.decode(), 10 * weights)


CODEBOOKS = [Codebook(1), Codebook(2), Codebook(16), Codebook(4, scope="global")]
THRESHOLDS = [
    Quantize("ternary"),
    Quantize("int2", granularity="tensor"),
    Quantize("ternary", granularity="group:7"),
    Compose([Prune(0.5), Quantize("ternary")]),
]


@pytest.mark.parametrize(
    ("scheme", "growth"),
    [
        *((scheme, 4) for scheme in THRESHOLDS),
        *((scheme, 0.25) for scheme in [*THRESHOLDS, *CODEBOOKS]),
        (Compose([Prune(0.5), Codebook(3)]), 0.25),
    ],
    ids=lambda value: value.describe() if isinstance(value, Scheme) else f"x{value}",
)
def test_boundaries_grow_or_shrink_with_the_weights(scheme: Scheme, growth: float) -> None:
    module = filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(30, 40)))
    weights = {n: p.detach() for n, p in module.named_parameters()}
    bound = scheme.bind(module)
    theta = bound.pi(weights)
    kept = boundaries_of(theta)
    assert kept
    again = bound.delta(bound.pi(weights, boundaries=kept))
    resized = bound.delta(bound.pi({n: growth * w for n, w in weights.items()}, boundaries=kept))
    for name, decoded in bound.delta(theta).items():
        # The same weights go together; what they are rounded to may fit even better.
        assert len(torch.stack([decoded, again[name]]).flatten(1).unique(dim=1).T) == len(
            decoded.unique()
        )
        error, before = ((w - weights[name]).square().sum() for w in (again[name], decoded))
        assert error <= (1 + 1e-6) * before
        torch.testing.assert_close(resized[name], growth * again[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_weights_of_fewer_values_than_entries_may_get_more(scope: str) -> None:
    # A layer that begins at zero would have no boundary for good.
    bound = Codebook(2, scope=scope).bind(nn.Linear(4, 1, bias=False))  # type: ignore[arg-type]
    theta = bound.pi({"weight": torch.zeros(1, 4)})
    assert boundaries_of(theta) == {}
    later = {"weight": torch.tensor([[-1.0, 3.0, 3.0, -1.0]])}
    assert torch.equal(
        bound.pi(later, boundaries=boundaries_of(theta))["weight"].codes, later["weight"]
    )


def test_what_another_scheme_rounds_keeps_no_boundaries() -> None:
    module = filled(nn.Linear(30, 40))
    for dtype in ("int8", "int4", "binary", "float16", "float8_e4m3fn"):
        assert boundaries_of(pi(Quantize(dtype), module)) == {}
    assert boundaries_of(pi(Prune(0.3), module)) == {}
    assert boundaries_of(pi(Compose([LowRank(rank=3), Codebook(4)]), module)) == {}
