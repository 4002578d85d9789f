"""Compositions in which every stage has layers of its own, and how they say what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lightning_condensa import (
    Add,
    BlockPrune,
    Codebook,
    Compose,
    FilterPrune,
    LowRank,
    NeuronPrune,
    NMPrune,
    Prune,
    Quantize,
    Range,
    Scheme,
)
from lightning_condensa.schemes import SelectionError

from .networks import filled, pi

SCHEME = Path(__file__).parents[2] / "examples" / "mixed_scheme" / "scheme.yaml"


def network() -> nn.Module:
    """The layers of the digits example, smaller."""
    layers = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 12),
    )  # fmt: skip
    return filled(nn.ModuleDict({"layers": layers}))


@pytest.mark.parametrize(
    ("scheme", "rounds"),
    [
        (Quantize("binary"), True),
        (Codebook(2), True),
        (Compose([Prune(0.5), Quantize("int8")]), True),
        (Prune(0.5), False),
        (LowRank(rank=2), False),
        (Compose([LowRank(rank=2), Quantize("int8")]), False),
        (Add([Codebook(2), Prune(0.1)]), False),
    ],
)
def test_whether_rounding_is_all_that_happens_to_what_is_kept(scheme: Scheme, rounds: bool) -> None:
    assert scheme.bind(network()).rounds == rounds


def test_each_stage_changes_its_own_layers() -> None:
    scheme = Scheme.from_yaml(SCHEME.read_text())
    theta = pi(scheme, network())
    assert {n: e.value_bits for n, e in theta.items() if n.endswith("weight")} == {
        "layers.0.weight": 8,
        "layers.2.weight": 4,
        "layers.6.weight": 4,
        "layers.8.weight": 8,
    }
    filters = [theta[f"layers.{i}.weight"].mask.flatten(1).any(1) for i in (0, 2)]
    assert int(torch.cat(filters).sum()) == 10
    for i, keep in zip((0, 2), filters, strict=True):
        assert torch.equal(theta[f"layers.{i}.bias"].mask, keep)
    blocks = theta["layers.6.weight"].mask.unflatten(1, (-1, 4)).unflatten(0, (-1, 4))
    per_block = blocks.movedim(1, 2).flatten(2).sum(2)
    assert set(per_block.flatten().tolist()) == {0, 16}
    assert int(per_block.sum()) == 16 * round(0.1 * 8 * 24)
    assert int(theta["layers.8.weight"].mask.sum()) == 16 * round(0.5 * 3 * 8)
    assert Scheme.from_yaml(scheme.to_yaml()) == scheme


INT8, INT4 = Quantize("int8", include="layers.0"), Quantize("int4")


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([INT8, INT4], r"layers.0.weight would be quantized twice, in .*int8.* → .*int4"),
        (
            [INT8, Codebook(4)],
            r"layers.0.weight would be quantized twice, in Quan.* → Codebook",
        ),
        ([Prune(0.5), FilterPrune(0.5, include="6")], r"^FilterPrune\(.*: include='6' matches no"),
        (
            [NMPrune(2, 4), NeuronPrune(0.5)],
            r"^NMPrune\(n=2, m=4\): .*m=4 does not divide the 1",
        ),
        ([FilterPrune(0.5), BlockPrune(1e-3)], r"^BlockPrune\(.*: density=0.001 keeps 0 of"),
        (
            [FilterPrune(0.5), Quantize("int8", types="Lin")],
            r"^Quantize\(.*: the scheme selects",
        ),
    ],
)
def test_the_error_names_the_stage(stages: list[Scheme], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Compose(stages).bind(network())


def test_the_example_with_one_pattern_missing_is_refused() -> None:
    config = yaml.safe_load(SCHEME.read_text())
    config["init_args"]["schemes"][3]["init_args"]["exclude"] = ["layers.8"]
    scheme = Scheme.from_config(config)
    with pytest.raises(ValueError, match=r"layers\.0\.weight would be quantized twice"):
        scheme.bind(network())


def test_a_pattern_without_a_match_stays_a_selection_error() -> None:
    with pytest.raises(SelectionError, match=r"^Prune"):
        Compose([Prune(0.5, include="nothing"), Quantize("int8")]).bind(network())


def test_open_dimensions_are_the_compositions_own() -> None:
    with pytest.raises(
        ValueError, match=r"^the scheme still has open dimensions \['prune.density'"
    ):
        Compose([Prune(Range(0.1, 1.0)), FilterPrune(0.5, include="6")]).bind(network())
