"""The table of schemes and layers in ``docs/schemes.md`` is what the schemes do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from lightning_condensa import (
    BlockPrune,
    Codebook,
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
from lightning_condensa.testing import LAYERS, check_scheme

from .schemes.networks import Tied

LAWS = ("idempotent", "like the weight", "exact density", "saves")

#: Column of the table → modules of that kind.
COLUMNS: Mapping[str, list[Callable[[], nn.Module]]] = {
    "Linear": [LAYERS["linear"], LAYERS["two layers"]],
    "Conv1/2/3d": [LAYERS["conv1d"], LAYERS["conv2d"], LAYERS["conv3d"]],
    "transposed": [
        LAYERS["transposed"],
        lambda: nn.ConvTranspose1d(4, 6, 3),
        lambda: nn.ConvTranspose3d(4, 6, 2),
    ],
    "grouped": [LAYERS["grouped"]],
    "depthwise": [LAYERS["depthwise"]],
    "LSTM, GRU": [LAYERS["lstm"], LAYERS["gru"]],
    "`MultiheadAttention`": [LAYERS["attention"]],
    "q, k, v, o": [LAYERS["grouped-query attention"]],
    "Embedding": [lambda: nn.Embedding(12, 8)],
    "tied": [Tied],
}

#: Row → schemes; each takes ``types=`` and the dimensions of the weights.
ROWS: Mapping[str, list[Callable[..., Scheme]]] = {
    "`Prune`": [lambda dims, **types: Prune(0.5, **types)],
    "`NeuronPrune`": [lambda dims, **types: NeuronPrune(0.5, **types)],
    "`FilterPrune`": [lambda dims, **types: FilterPrune(0.5, **types)],
    "`BlockPrune`": [lambda dims, **types: BlockPrune(0.5, (2,) * dims, **types)],
    "`HeadPrune`": [lambda dims, **types: HeadPrune(0.5, **types)],
    "`HiddenPrune`": [lambda dims, **types: HiddenPrune(0.5, **types)],
    "`NMPrune`": [lambda dims, **types: NMPrune(1, 2, **types)],
    "`LowRank`": [lambda dims, **types: LowRank(rank=2, **types)],
    "`Quantize`": [
        partial(lambda dtype, dims, **types: Quantize(dtype, **types), dtype)
        for dtype in ("float16", "int8", "int4", "ternary", "binary")
    ],
    "`Codebook`": [lambda dims, **types: Codebook(4, **types)],
}


def cells() -> list[tuple[str, str, str]]:
    """``(row, column, cell)`` of the table."""
    text = (Path(__file__).parents[1] / "docs" / "schemes.md").read_text()
    lines = text.partition("## Layers")[2].partition("\n## ")[0].splitlines()
    table = [line for line in lines if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return [
        (name, column, cell)
        for name, *row in rows
        for column, cell in zip(header[1:], row, strict=True)
    ]


def test_the_table_has_every_scheme_and_layer() -> None:
    assert [(row, column) for row, column, _ in cells()] == [
        (row, column) for row in ROWS for column in COLUMNS
    ]


@pytest.mark.parametrize(("row", "column", "cell"), cells())
def test_a_cell_is_what_the_scheme_does(row: str, column: str, cell: str) -> None:
    for build in COLUMNS[column]:
        module = build()
        dims = next(p.dim() for p in module.parameters() if p.dim() > 1)
        for make in ROWS[row]:
            scheme = make(dims)
            if cell in ("–", "`types=`"):
                with pytest.raises(ValueError):
                    scheme.bind(module)
            if cell == "–":
                continue
            if cell == "`types=`":
                scheme = make(dims, types=type(module).__name__)
            if cell == "`out_proj`":
                assert {n.split(".")[0] for n in scheme.bind(module).names} == {"out_proj"}
            assert all(check_scheme(scheme, law, {column: build}) == 1 for law in LAWS)


def test_a_classifier_tied_to_an_embedding_goes_by_the_embedding() -> None:
    module = nn.ModuleDict({"tokens": nn.Embedding(12, 8), "head": nn.Linear(8, 12)})
    module["head"].weight = module["tokens"].weight
    with pytest.raises(ValueError, match="selects no weight"):
        Prune(0.5).bind(module)
    for scheme in (Prune(0.5, types="Embedding"), Quantize("int8", types="Embedding")):
        assert scheme.bind(module).names == ("tokens.weight",)


@pytest.mark.parametrize("scheme", [Prune(0.5), NeuronPrune(0.5), Quantize("int8"), Codebook(4)])
def test_a_tied_weight_is_compressed_once(scheme: Scheme) -> None:
    names = scheme.bind(Tied()).names
    assert "first.weight" in names and "second.weight" not in names
