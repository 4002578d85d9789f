from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_condensa.functional.criteria import get_criterion
from lightning_condensa.schemes import (
    BlockPrune,
    Compose,
    Encoded,
    FilterPrune,
    NeuronPrune,
    NMPrune,
    NotFiniteError,
    Prune,
    Quantize,
    Scheme,
    structured,
)

from .networks import LAYERS, Tied, filled, linears, pi

SMALL = st.floats(-4, 4, width=16)


def project(scheme: Scheme, layer: nn.Module, weight: Tensor) -> Tensor:
    with torch.no_grad():
        layer.weight.copy_(weight)
    return scheme.bind(layer).delta(pi(scheme, layer))["weight"]


def assert_nearest(weight: Tensor, result: Tensor, groups: list[Tensor], keep: int) -> None:
    """No other choice of ``keep`` groups is nearer in the Frobenius norm."""
    best = min(
        weight[~torch.stack(chosen).any(0)].double().square().sum().item()
        for chosen in itertools.combinations(groups, keep)
    )
    assert (weight - result).double().square().sum().item() == pytest.approx(best, abs=1e-6)
    assert torch.all((result == weight) | (result == 0))


def unit_groups(shape: tuple[int, ...], block: tuple[int, ...]) -> list[Tensor]:
    """The element masks of every block."""
    groups = []
    for corner in itertools.product(*(range(0, n, b) for n, b in zip(shape, block, strict=True))):
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[tuple(slice(c, c + b) for c, b in zip(corner, block, strict=True))] = True
        groups.append(mask)
    return groups


@given(st.lists(SMALL, min_size=8, max_size=8), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_prune_is_nearest(values: list[float], keep: int) -> None:
    weight = torch.tensor(values).reshape(2, 4)
    result = project(Prune(keep / 8), nn.Linear(4, 2), weight)
    assert_nearest(weight, result, unit_groups((2, 4), (1, 1)), keep)


@given(st.lists(SMALL, min_size=18, max_size=18), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_neuron_prune_is_nearest(values: list[float], keep: int) -> None:
    weight = torch.tensor(values).reshape(6, 3)
    result = project(NeuronPrune(keep / 6), nn.Linear(3, 6), weight)
    assert_nearest(weight, result, unit_groups((6, 3), (1, 3)), keep)


@given(st.lists(SMALL, min_size=24, max_size=24), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_filter_prune_is_nearest(values: list[float], keep: int) -> None:
    weight = torch.tensor(values).reshape(4, 3, 2)
    result = project(FilterPrune(keep / 4), nn.Conv1d(3, 4, 2), weight)
    assert_nearest(weight, result, unit_groups((4, 3, 2), (1, 3, 2)), keep)
    transposed = weight.reshape(3, 4, 2)
    result = project(FilterPrune(keep / 4), nn.ConvTranspose1d(3, 4, 2), transposed)
    assert_nearest(transposed, result, unit_groups((3, 4, 2), (3, 1, 2)), keep)


@given(st.lists(SMALL, min_size=24, max_size=24), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_block_prune_is_nearest_where_blocks_fit(values: list[float], keep: int) -> None:
    weight = torch.tensor(values).reshape(4, 6)
    result = project(BlockPrune(keep / 6, (2, 2)), nn.Linear(6, 4), weight)
    assert_nearest(weight, result, unit_groups((4, 6), (2, 2)), keep)


@given(st.lists(SMALL.filter(bool), min_size=15, max_size=15), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_ragged_blocks_are_scored_per_element(values: list[float], keep: int) -> None:
    weight = torch.tensor(values).reshape(3, 5)
    result = project(BlockPrune(keep / 6, (2, 2)), nn.Linear(5, 3), weight)
    groups = unit_groups((3, 5), (2, 2))
    scores = torch.stack([weight[g].square().mean() for g in groups])
    kept = torch.tensor([bool((result[g] == weight[g]).all()) for g in groups])
    assert kept.sum() == keep
    if keep < len(groups):
        assert scores[kept].min() >= scores[~kept].max() - 1e-6
        assert all(
            torch.count_nonzero(result[g]) == 0 for g, k in zip(groups, kept, strict=True) if not k
        )


@given(st.lists(SMALL, min_size=16, max_size=16))
@settings(max_examples=40, deadline=None)
def test_nm_prune_is_nearest(values: list[float]) -> None:
    weight = torch.tensor(values).reshape(2, 8)
    result = project(NMPrune(2, 4), nn.Linear(8, 2), weight)
    for part, kept in zip(weight.reshape(-1, 4), result.reshape(-1, 4), strict=True):
        assert_nearest(part, kept, unit_groups((4,), (1,)), 2)


def test_half_precision_scores_neither_overflow_nor_tie() -> None:
    layer = nn.Linear(200, 3, bias=False, dtype=torch.float16)
    weight = torch.full((3, 200), 300.0, dtype=torch.float16)
    weight[1, 0] = 301
    result = project(NeuronPrune(1 / 3), layer, weight)
    assert torch.count_nonzero(result, 1).tolist() == [0, 200, 0]


@pytest.mark.parametrize("value", [2e38, 3e38])
def test_large_finite_weights_are_no_divergence(value: float) -> None:
    result = project(Prune(0.5), nn.Linear(4, 1), torch.tensor([[value, value, 1.0, 2.0]]))
    assert torch.count_nonzero(result) == 2


# -- exact counts ----------------------------------------------------------------------------------


@given(
    st.floats(0.02, 1.0),
    st.lists(st.integers(2, 9), min_size=2, max_size=4),
    st.sampled_from(["global", "layer"]),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_density_is_exact(density: float, widths: list[int], scope: str, equal: bool) -> None:
    module = filled(linears(*widths))
    if equal:
        nn.init.constant_(module[0].weight, 0.5)
    sizes = [layer.weight.numel() for layer in module]
    expected = (
        [round(density * n) for n in sizes] if scope == "layer" else [round(density * sum(sizes))]
    )
    scheme = Prune(density, scope=scope)
    if min(expected) < (1 if scope == "layer" else len(sizes)):
        with pytest.raises(ValueError, match="min_per_layer"):
            scheme.bind(module)
        return
    kept = [e.nnz for e in pi(scheme, module).values()]
    assert (kept if scope == "layer" else [sum(kept)]) == expected
    assert min(kept) >= 1


def test_all_equal_weights_are_cut_in_order() -> None:
    module = linears(3, 2, 2)
    for layer in module:
        nn.init.ones_(layer.weight)
    theta = pi(Prune(0.5), module)
    assert theta["0.weight"].codes.flatten().tolist() == [1, 1, 1, 1, 0, 0]
    assert theta["1.weight"].codes.flatten().tolist() == [1, 0, 0, 0]  # its floor


def test_all_zero_weights_keep_an_exact_support() -> None:
    module = linears(4, 5)
    nn.init.zeros_(module[0].weight)
    theta = pi(Prune(0.25), module)["0.weight"]
    assert int(theta.mask.sum()) == 5
    assert theta.nnz == 0


@pytest.mark.parametrize("floor", [0, 1, 3, 6])
def test_floors_hold_and_the_total_stays_exact(floor: int) -> None:
    module = filled(linears(6, 5, 4, 3))
    with torch.no_grad():
        module[0].weight.mul_(1e-3)
        module[1].weight.mul_(1e-6)
    theta = pi(Prune(0.4, min_per_layer=floor), module)
    kept = [e.nnz for e in theta.values()]
    assert sum(kept) == round(0.4 * 62)
    assert min(kept) == floor
    for name, encoded in theta.items():  # within a layer the largest survive
        magnitudes = module.get_parameter(name).detach().abs()
        best = magnitudes.flatten().topk(encoded.nnz).values.sum()
        torch.testing.assert_close(encoded.codes.abs().sum(), best)


def test_a_floor_that_pushes_another_layer_below_its_own() -> None:
    module = linears(4, 1, 4, 1)
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[9.0, 9, 9, 9]]))
        module[1].weight.copy_(torch.tensor([[5.0], [4], [1], [1]]))
        module[2].weight.copy_(torch.tensor([[0.1, 0.1, 0.1, 0.1]]))
    kept = [e.nnz for e in pi(Prune(0.5, min_per_layer=2), module).values()]
    assert kept == [2, 2, 2]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_overrides_have_thresholds_of_their_own(scope: str) -> None:
    module = filled(linears(10, 10, 20, 10))
    scheme = Prune(0.1, overrides={"^0": 0.5, "weight": 0.2}, scope=scope)
    kept = [e.nnz for e in pi(scheme, module).values()]
    assert kept[0] == 50
    assert sum(kept[1:]) == round(0.2 * 400)
    if scope == "layer":
        assert kept[1:] == [40, 40]


@pytest.mark.parametrize("density", [0.1, 0.35, 0.5, 0.9])
@pytest.mark.parametrize("align", [1, 2, 4, 5])
def test_align_keeps_multiples(density: float, align: int) -> None:
    module = filled(linears(6, 16, 12))
    theta = pi(NeuronPrune(density, align=align), module)
    plain = pi(NeuronPrune(density), module)
    for name in ("0.weight", "1.weight"):
        rows = theta[name].codes.shape[0]
        count = int(theta[name].codes.any(1).sum())
        asked = int(plain[name].codes.any(1).sum())
        assert count % align == 0 or count == rows
        assert count >= 1
        assert abs(count - asked) <= align / 2 or asked < align or count == rows


def test_structures_are_equal_where_align_makes_them_so() -> None:
    def structure(density: float, scope: str, coupled: bool = False) -> object:
        module = filled(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()))
        module.append(nn.Linear(16, 4))
        module.example_input_array = torch.rand(2, 6)
        chosen = {"coupled": True} if coupled else {"exclude": "4.weight"}
        return NeuronPrune(density, align=4, scope=scope, **chosen).bind(module).structure

    for coupled in (False, True):
        # 11 and 13 of 16 both become 12 where each layer is for itself.
        assert structure(0.7, "layer", coupled) == structure(0.8, "layer", coupled)
        assert structure(0.5, "layer", coupled) != structure(0.7, "layer", coupled)
        assert structure(0.7, "global", coupled) != structure(0.8, "global", coupled)


@pytest.mark.parametrize("prune_bias", [True, False])
def test_biases_follow_their_units(prune_bias: bool) -> None:
    for layer, scheme in [
        (nn.Linear(3, 6), NeuronPrune(0.5, prune_bias=prune_bias)),
        (nn.Conv2d(4, 6, 3, groups=2), FilterPrune(0.5, prune_bias=prune_bias)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), FilterPrune(0.5, prune_bias=prune_bias)),
    ]:
        bound = scheme.bind(filled(layer))
        weights = bound.delta(bound.pi(dict(layer.named_parameters())))
        with torch.no_grad():
            for name, value in weights.items():
                layer.get_parameter(name).copy_(value)
        x = torch.rand(1, 3 if isinstance(layer, nn.Linear) else 4, *[5] * (layer.weight.dim() - 2))
        silent = (
            int((layer(x).flatten(2).abs().sum(-1) == 0).sum())
            if x.dim() > 2
            else int((layer(x) == 0).sum())
        )
        assert silent == (3 if prune_bias else 0)


def test_global_groups_compare_across_sizes() -> None:
    module = nn.Sequential(nn.Linear(2, 4), nn.Linear(200, 4))
    nn.init.constant_(module[0].weight, 2.0)
    nn.init.constant_(module[1].weight, 1.0)
    theta = pi(NeuronPrune(0.625), module)
    assert [theta[n].codes.any(1).sum().item() for n in ("0.weight", "1.weight")] == [4, 1]


# -- any scheme on any layer -----------------------------------------------------------------------

SCHEMES: dict[str, Scheme] = {
    "prune": Prune(0.3),
    "prune by layer": Prune(0.3, scope="layer"),
    "neuron": NeuronPrune(0.5),
    "neuron aligned": NeuronPrune(0.4, align=4),
    "filter": FilterPrune(0.5, criterion="l1"),
    "n:m": NMPrune(1, 2),
    "float16": Quantize("float16"),
    "bfloat16": Quantize("bfloat16"),
    "int8": Quantize("int8"),
    "int8 by tensor": Quantize("int8", granularity="tensor"),
    "prune, float16": Compose([Prune(0.3), Quantize("float16")]),
    "prune, int8": Compose([Prune(0.3), Quantize("int8")]),
    "prune, n:m, int8": Compose([Prune(0.6), NMPrune(1, 2), Quantize("int8")]),
    "neuron, prune": Compose([NeuronPrune(0.5), Prune(0.2), Quantize("bfloat16")]),
    "filter, prune": Compose([FilterPrune(0.5), Prune(0.3), Quantize("int8")]),
}
CASES = [
    (s, layer)
    for s in SCHEMES
    for layer in LAYERS
    if ("neuron" not in s or layer in ("linear", "tied"))
    and ("filter" not in s or "conv" in layer or "transposed" in layer or "wise" in layer)
    and ("n:m" not in s or layer in ("linear", "conv1d", "conv2d", "conv3d", "grouped"))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "layer"), CASES)
def test_contract(scheme: str, layer: str, dtype: torch.dtype) -> None:
    module = filled(LAYERS[layer]().to(dtype))
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    bound = SCHEMES[scheme].bind(module)
    assert bound.names
    assert not any(n.rpartition(".")[2].startswith("bias_") for n in bound.names)
    theta = bound.pi(weights)
    decoded = bound.delta(theta)
    for name in bound.names:
        assert decoded[name].dtype == dtype
        assert decoded[name].shape == weights[name].shape
        mask = theta[name].mask
        if mask is not None:
            pruned = decoded[name][~mask]
            assert torch.count_nonzero(pruned) == 0
            assert not torch.signbit(pruned).any()
    assert all(torch.equal(p, weights[n]) for n, p in module.named_parameters())
    again = bound.delta(bound.pi(decoded))
    for name in bound.names:
        if "int8" in scheme and dtype == torch.bfloat16:
            # 8 significant bits cannot hold code × scale: near, within their rounding.
            largest = weights[name].abs().max().item()
            torch.testing.assert_close(again[name], decoded[name], rtol=0.01, atol=largest / 127)
        else:
            assert torch.equal(again[name], decoded[name])


@pytest.mark.parametrize("shape", [(4, 4), (3, 5)])
def test_block_prune_is_idempotent(shape: tuple[int, int]) -> None:
    bound = BlockPrune(0.4, (2, 2)).bind(layer := filled(nn.Linear(*shape)))
    once = bound.delta(bound.pi(dict(layer.named_parameters())))
    again = bound.delta(bound.pi(once))
    assert torch.equal(once["weight"], again["weight"])


def test_tied_weights_count_once() -> None:
    module = filled(Tied())
    bound = Prune(0.5).bind(module)
    assert bound.names == ("first.weight", "head.weight")
    assert sum(e.nnz for e in bound.pi(dict(module.named_parameters())).values()) == 24


def test_lazy_modules_need_a_batch_first() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="run one batch through the lazy module first"):
        Prune(0.5).bind(lazy)
    lazy(torch.rand(2, 3))
    assert Prune(0.5).bind(lazy).names == ("0.weight",)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "scheme",
    [Prune(0.5), NeuronPrune(0.5, criterion="min"), NMPrune(), Quantize("int8"), Quantize()],
)
def test_weights_that_are_not_finite(scheme: Scheme, value: float) -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[2, 1] = value
    with pytest.raises(NotFiniteError, match=r"weight holds values that are not finite"):
        pi(scheme, layer)


def test_a_later_prune_revives_nothing() -> None:
    module = filled(linears(10, 10))
    theta = pi(Compose([Prune(0.2), NMPrune(1, 2), Prune(0.9)]), module)["0.weight"]
    first = pi(Prune(0.2), module)["0.weight"]
    assert not torch.any(theta.mask & ~first.mask)
    assert torch.all(theta.codes[~theta.mask] == 0)


def test_storage_bits() -> None:
    layer = filled(nn.Linear(10, 4))

    def bits(scheme: Scheme) -> int:
        return pi(scheme, layer)["weight"].storage_bits

    assert bits(Prune(0.25)) == 10 * 32
    assert bits(Compose([Prune(0.25), Quantize("float16")])) == 10 * 16
    int8: Mapping[str, Encoded] = pi(Compose([Prune(0.25), Quantize("int8")]), layer)
    assert int8["weight"].storage_bits == int8["weight"].nnz * 8 + 4 * 32
    assert bits(Quantize("int8", granularity="tensor")) == (
        pi(Quantize("int8", granularity="tensor"), layer)["weight"].nnz * 8 + 32
    )


def test_int8_scales_follow_output_channels() -> None:
    conv = filled(nn.ConvTranspose2d(4, 6, 3))
    assert pi(Quantize("int8"), conv)["weight"].scale.shape == (1, 6, 1, 1)
    assert pi(Quantize("int8"), filled(nn.Conv2d(4, 6, 3)))["weight"].scale.shape == (6, 1, 1, 1)


@pytest.mark.parametrize("criterion", ["l1", "l2", "max", "min", "sum"])
@pytest.mark.parametrize(
    "scheme, layer",
    [
        (NeuronPrune(0.5), nn.Linear(5, 11)),
        (BlockPrune(0.5, (2, 3)), nn.Linear(7, 13)),
        (BlockPrune(0.5, (4, 1)), nn.Linear(8, 12)),
        (FilterPrune(0.5), nn.Conv2d(3, 10, 3)),
        (FilterPrune(0.5), nn.ConvTranspose2d(4, 6, 3, groups=2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_groups_are_scored_alike_in_slabs(
    scheme: Scheme, layer: nn.Module, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = replace(scheme, criterion=criterion)
    expected = pi(replace(scheme, criterion=get_criterion(criterion)), layer)["weight"]
    for length in (1, 30, 1 << 16):
        monkeypatch.setattr(structured, "chunk_length", lambda weight, length=length: length)
        found = pi(named, layer)["weight"]
        assert found.mask.any() and not found.mask.all()
        assert torch.equal(found.mask, expected.mask)
