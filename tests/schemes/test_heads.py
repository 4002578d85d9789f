"""Attention heads: what is removed is a head, all of it and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_condensa import (
    Compose,
    CompressedModel,
    HeadPrune,
    Prune,
    Quantize,
    Range,
    Scheme,
    load_compressed,
)
from lightning_condensa.functional.spans import Spans
from lightning_condensa.schemes import NotFiniteError, SelectionError

from .attentions import STYLES, T5, Attention, Fused, MultiQuery, Separate, Torch
from .networks import filled, pi


def built(style: str) -> Attention:
    return filled(STYLES[style]().double(), seed=3)


def prune(module: nn.Module, scheme: Scheme) -> None:
    bound = scheme.bind(module)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, weight in bound.delta(bound.pi(parameters)).items():
            parameters[name].copy_(weight)


def groups_of(module: Attention) -> int:
    return module.shared if module.shared > 1 else module.count


def query_heads(module: Attention, groups: list[int]) -> list[int]:
    share = module.count // groups_of(module)
    return [g * share + i for g in groups for i in range(share)]


def membership(module: Attention) -> dict[str, Tensor]:
    """The group of each element, by what it has an influence on; -1 if on none or on several."""
    q, k, v = module.projected(torch.randn(5, module.features, dtype=torch.float64))
    columns = module.out_weight()[0].unflatten(1, (module.count, -1))
    found = {n: torch.full(p.shape, -1) for n, p in module.named_parameters()}
    times = {n: torch.zeros(p.shape) for n, p in module.named_parameters()}
    for group in range(groups_of(module)):
        heads, shared = query_heads(module, [group]), min(group, k.shape[1] - 1)
        own = [q[:, heads], k[:, shared], v[:, shared], columns[:, heads]]
        module.zero_grad()
        torch.stack([t.square().sum() for t in own]).sum().backward(retain_graph=True)
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[name][parameter.grad != 0] = group
                times[name] += parameter.grad != 0
    return {n: f.where(times[n] == 1, torch.tensor(-1)) for n, f in found.items()}


def scored(name: str) -> bool:
    return "bias" not in name


@pytest.mark.parametrize("criterion", ["l2", "l1", "max"])
@pytest.mark.parametrize("style", STYLES)
def test_the_output_is_that_of_the_heads_that_remain(style: str, criterion: str) -> None:
    module = built(style)
    x = torch.randn(5, module.features, dtype=torch.float64)
    every = list(range(module.count))
    torch.testing.assert_close(module(x), module(x, every))  # nn.MultiheadAttention as written out
    members = membership(module)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    of_group = [
        torch.cat([before[n][m == g] for n, m in members.items() if scored(n)]).abs()
        for g in range(groups_of(module))
    ]
    assert len({len(g) for g in of_group}) == 1
    score = {
        "l2": lambda g: g.square().sum(),
        "l1": lambda g: g.sum(),
        "max": lambda g: g.max(),
    }[criterion]
    best = torch.stack([score(g) for g in of_group]).topk(groups_of(module) // 2).indices
    kept = sorted(best.tolist())
    remaining = module(x, query_heads(module, kept))

    prune(module, HeadPrune(0.5, criterion=criterion))
    for name, parameter in module.named_parameters():
        keep = torch.isin(members[name], torch.tensor([-1, *kept]))
        assert torch.equal(parameter, before[name] * keep), name
    torch.testing.assert_close(module(x), remaining, rtol=1e-12, atol=1e-12)


def test_biases_can_stay() -> None:
    module = built("timm")
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    x = torch.randn(5, module.features, dtype=torch.float64)
    prune(module, HeadPrune(0.25, prune_bias=False))
    assert torch.equal(module.qkv.bias, before["qkv.bias"])
    (kept,) = module.proj.weight.unflatten(1, (4, -1)).flatten(2).abs().sum((0, 2)).nonzero()
    torch.testing.assert_close(module(x), module(x, kept.tolist()))


class Network(nn.Module):
    """Attention of several styles, and layers that have no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Torch()  # 4 heads
        self.second = Separate()  # 2 groups of 2
        self.third = MultiQuery()  # 4 query heads on one key
        self.head = nn.Linear(10, 3)


NAMES = {
    "first.torch.in_proj_weight": 4,
    "second.q_proj.weight": 2,
    "third.q_proj.weight": 4,
}


def kept_heads(module: nn.Module, scheme: Scheme) -> list[int]:
    bound = scheme.bind(module)
    theta = bound.pi(dict(module.named_parameters()))
    (_, targets), *_ = bound.stages
    counts = []
    for target in targets:
        rows = target.weights[0].spans.split(theta[target.name].codes)[0]
        counts.append(int(rows.any(1).sum()))
    return counts


def test_density_is_exact_over_all_modules() -> None:
    network = filled(Network())
    with torch.no_grad():
        for parameter in network.second.parameters():
            parameter.mul_(0.01)
    for kept in range(3, 11):
        assert sum(kept_heads(network, HeadPrune(kept / 10))) == kept
    assert kept_heads(network, HeadPrune(0.5))[1] == 1  # min_per_layer
    assert kept_heads(network, HeadPrune(0.5, min_per_layer=0))[1] == 0
    assert kept_heads(network, HeadPrune(0.5, scope="layer")) == [2, 1, 2]
    overrides = HeadPrune(1.0, overrides={"first": 0.25, "third": 0.5})
    assert kept_heads(network, overrides) == [1, 2, 2]
    aligned = kept_heads(network, HeadPrune(0.5, align=2, exclude="second"))
    assert all(n % 2 == 0 for n in aligned)


def test_selection_goes_by_the_names_of_the_queries() -> None:
    network = Network()
    assert [t.name for t in HeadPrune(0.5).select(network)] == list(NAMES)
    (only,) = HeadPrune(0.5, include="second").select(network)
    assert only.name == "second.q_proj.weight"
    assert [t.name for t in HeadPrune(0.5, types="MultiheadAttention").select(network)] == [
        "first.torch.in_proj_weight"
    ]
    assert len(HeadPrune(0.5, types="Separate").select(network)) == 2  # and what inherits
    with pytest.raises(SelectionError, match="include='head' matches no weight"):
        HeadPrune(0.5, include="head").select(network)


def test_every_parameter_says_why_it_stays() -> None:
    network = filled(Network())
    report = CompressedModel.compress(network, HeadPrune(0.5, exclude="second")).report()
    reasons = {s.name: s.reason for s in report.skipped}
    rows = {r.name for r in report.rows}
    assert rows | reasons.keys() == {n for n, _ in network.named_parameters()}
    assert reasons["second.v_proj.bias"] == "excluded by 'second'"
    for name in ("head.weight", "first.torch.out_proj.bias", "third.k_proj.weight"):
        assert reasons[name] == "in no group of the scheme"
    assert "third.q_proj.bias" in rows


class Own(nn.Module):
    """As nobody else would name it."""

    def __init__(self) -> None:
        super().__init__()
        self.dims = nn.Module()
        self.dims.count = 4
        self.mixed = nn.Linear(8, 24, bias=False)
        self.after = nn.Sequential(nn.Linear(8, 8))


OWN: dict[str, Any] = {
    "projections": {"mixed": "qkv", "after.0": "o"},
    "num_heads": "dims.count",
    "types": "Own",
}


@pytest.mark.parametrize("count", ["dims.count", 4])
def test_a_module_of_ones_own(count: str | int) -> None:
    scheme = HeadPrune(0.75, **OWN | {"num_heads": count})
    assert Scheme.from_yaml(scheme.to_yaml()) == scheme
    network = nn.ModuleDict({"a": Own(), "b": Fused()})
    (target,) = scheme.select(filled(network))
    assert [m.name for m in target.weights] == ["a.mixed.weight", "a.after.0.weight"]
    assert kept_heads(network, scheme) == [3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"projections": {"a": "q", "b": "k"}}, "projections must name the places"),
        ({"projections": {"a": "qkv", "b": "x"}}, "projections must name the places"),
        ({"num_heads": 0}, "num_heads must be an int >= 1"),
        ({"num_heads": True}, "num_heads must be an int >= 1"),
        ({"num_heads": ""}, "num_heads must be an int >= 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HeadPrune(0.5, **arguments)


def silent(module: nn.Module) -> nn.Module:
    del module.num_heads
    return module


def uneven() -> nn.Module:
    """Six query heads on four keys."""
    module = nn.Module()
    module.num_heads = 6
    for name, (rows, inputs) in {"q": (12, 5), "k": (8, 5), "v": (8, 5), "o": (5, 12)}.items():
        module.add_module(f"{name}_proj", nn.Linear(inputs, rows))
    return module


@pytest.mark.parametrize(
    ("build", "scheme", "words"),
    [
        (lambda: nn.Linear(3, 3), HeadPrune(0.5), "finds no attention in Linear .* projections="),
        (lambda: silent(Fused()), HeadPrune(0.5), "Fused does not say how many heads"),
        (Fused, HeadPrune(0.5, num_heads=5), "cannot be cut into 5 heads: qkv.weight"),
        (Separate, HeadPrune(0.5, num_heads=8), "cannot be cut into 8 heads"),
        (uneven, HeadPrune(0.5), "cannot be cut into 6 heads"),
        (T5, HeadPrune(0.1), "keeps 0 of 4"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    build: Callable[[], nn.Module], scheme: Scheme, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        scheme.bind(build())


def test_shared_projections_are_refused() -> None:
    network = nn.ModuleDict({"a": Fused(), "b": Fused()})
    network["b"].proj.weight = network["a"].proj.weight
    with pytest.raises(ValueError, match=r"a\.proj\.weight twice"):
        HeadPrune(0.5).bind(network)
    HeadPrune(0.5, exclude="b").bind(network)


def test_a_module_that_is_used_twice_is_pruned_once() -> None:
    network = nn.ModuleDict({"a": Fused()})
    network["b"] = network["a"]
    assert len(HeadPrune(0.5).select(network)) == 1


def test_a_diverged_weight_of_any_projection_is_named() -> None:
    for name in ("q_proj.weight", "v_proj.weight", "o_proj.weight"):
        module = Separate()
        with torch.no_grad():
            module.get_parameter(name)[0, 0] = torch.nan
        with pytest.raises(NotFiniteError, match=name):
            pi(HeadPrune(0.5), module)


def test_heads_then_elements_then_codes_in_a_file(tmp_path: Path) -> None:
    network = filled(Network())
    scheme = Compose([HeadPrune(0.5), Prune(0.4), Quantize("int8")])
    compressed = CompressedModel.compress(network, scheme)
    compressed.save(tmp_path / "heads.condensa")
    loaded = load_compressed(tmp_path / "heads.condensa", Network())
    for name, tensor in compressed.module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    masks = pi(HeadPrune(0.5), network)
    for name, encoded in masks.items():
        assert not compressed.theta[name].decode()[~encoded.mask].any()


def test_a_density_can_be_searched() -> None:
    scheme = HeadPrune(Range(0.2, 1.0), overrides={"first": Range(0.25, 1.0)})
    assert set(scheme.space()) == {"density", "density[first]"}
    values = {"density": 0.5, "density[first]": 0.75}
    assert kept_heads(filled(Network()), scheme.at(values))[0] == 3
    # Densities that keep as many heads are one candidate.
    structures = [
        scheme.at(values | {"density": d}).bind(Network()).structure for d in (0.5, 0.55, 0.7)
    ]
    assert structures[0] == structures[1] != structures[2]


@given(
    count=st.integers(1, 4),
    spans=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    rest=st.integers(0, 2),
    dim=st.integers(0, 2),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_spans_split_what_they_expand(
    count: int, spans: list[int], rest: int, dim: int, data: st.DataObject
) -> None:
    grouping = Spans(count, tuple(count * n for n in spans), dim)
    shape = [2, 3, 2]
    shape[dim] = count * sum(spans) + rest
    weight = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    mask = grouping.expand(keep, weight.shape)
    rows, sizes = grouping.split(weight)
    assert mask.shape == weight.shape
    assert torch.equal(grouping.split(weight * mask)[0], rows * keep[:, None])
    assert len(set(rows.flatten().tolist())) == rows.numel() == int(sizes.sum())
    # What is in no group is kept.
    outside = ~torch.isin(weight, rows)
    assert bool(mask[outside].all())
    assert int(outside.sum()) == rest * weight.numel() // shape[dim]
    assert grouping.grid(weight.shape) == (count,)
    # A part that cuts no group is split like the whole.
    unit = grouping.unit(weight.shape)
    assert [extent for d, extent in enumerate(unit) if d != dim] == [None, None]
    assert (unit[dim] is None) == (len(spans) > 1 or rest > 0)
    if unit[dim] is not None:
        part = Spans(1, (unit[dim],), dim).split(weight.narrow(dim, 0, unit[dim]))[0]
        assert torch.equal(part, rows[:1])
