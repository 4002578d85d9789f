from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.deploy.report import Report
from lightning_condensa.schemes import Add, Compose, LowRank, NeuronPrune, Prune, Quantize


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.Linear(8, 5), nn.Embedding(3, 4))


def compressed() -> CompressedModel:
    return CompressedModel.compress(
        module(), Compose([Prune(0.5, exclude="^2"), Quantize("float16", include="^0")])
    )


def test_rows_count_what_ships() -> None:
    report = compressed().report({"0.weight": 0.25})
    (row,) = report.rows
    assert (row.name, row.shape, row.nnz, row.density) == ("0.weight", (8, 10), 40, 0.5)
    assert (row.bits, row.value_bytes, row.gap) == (16, 80, 0.25)
    assert report.density == 0.5


def test_rows_of_structured_pruning_include_biases() -> None:
    report = CompressedModel.compress(module(), NeuronPrune(0.5, scope="layer")).report()
    figures = {r.name: (r.nnz, r.bits) for r in report.rows}
    assert figures == {
        "0.weight": (40, 32),
        "0.bias": (4, 32),
        "2.weight": (16, 32),
        "2.bias": (2, 32),
    }
    assert report.density == (40 + 4 + 16 + 2) / (80 + 8 + 40 + 5)
    assert all(math.isnan(r.gap) for r in report.rows)


def test_every_parameter_is_compressed_or_says_why_not() -> None:
    model = compressed()
    report = model.report()
    reasons = {s.name: s.reason for s in report.skipped}
    listed = [*(r.name for r in report.rows), *reasons]
    assert sorted(listed) == sorted(n for n, _ in model.module.named_parameters())
    assert "excluded by '^2'" in reasons["2.weight"]
    assert "matches no include pattern" in reasons["2.weight"]
    assert reasons["0.bias"] == "a bias"
    assert reasons["1.weight"] == "layer type LayerNorm is not selected"
    assert reasons["3.weight"] == "layer type Embedding is not selected"


def test_as_text_and_plain_data() -> None:
    report = compressed().report({"0.weight": 0.25})
    text = str(report)
    for expected in ("0.weight", "8×10", "50.00%", "0.250", "why not", "layer type Embedding"):
        assert expected in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["rows"][0]["nnz"] == 40
    assert {s["name"] for s in data["skipped"]} == {s.name for s in report.skipped}


def test_no_rows() -> None:
    assert Report((), ()).density == pytest.approx(0)


def test_rows_of_sums_and_products_count_their_parts() -> None:
    scheme = Compose(
        [Add([LowRank(rank=1), Prune(0.1, scope="layer")]), Quantize("float16", include="^0")]
    )
    report = CompressedModel.compress(module(), scheme).report()
    figures = {r.name: (r.shape, r.nnz, r.bits) for r in report.rows}
    assert figures["0.weight"] == ((8, 10), 18 + 8, 16)
    assert figures["2.weight"] == ((5, 8), 13 + 4, 32)
    assert report.density == (26 + 17) / 120
    assert [r.value_bytes for r in report.rows] == [2 * 26, 4 * 17]
    assert "32.50%" in str(report)
