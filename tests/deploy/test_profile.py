"""A profile attributes weights, operations and time to the modules that they belong to."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_condensa import Compose, CompressedModel, Prune, Quantize, profile
from lightning_condensa.deploy import to_sparse
from lightning_condensa.objectives import FLOPs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.weight = nn.Parameter(torch.randn(16, 4))
        self.idle = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.body(self.body[0](y)[:, :8]) @ self.weight


def rows_of(model, example: Tensor, **settings):
    report = profile(model, example, min_seconds=0.05, **settings)
    return {row.name: row for row in report.rows}, report


def test_each_module_has_its_own() -> None:
    net = Net()
    net.train()
    x = torch.rand(2, 3, 6, 6)
    rows, report = rows_of(net, x, threads=1)
    assert set(rows) == {"", "conv", "norm", "body.0", "body.1", "idle"}
    assert rows["conv"].flops == 2 * 2 * 8 * 36 * 27
    assert rows["body.0"].flops == 2 * (2 * 2 * 8 * 16)  # called twice
    assert rows[""].flops == 2 * 2 * 16 * 4
    assert rows["idle"].flops == 0 and rows["idle"].latency.median == 0
    assert rows["norm"].parameters == 16
    assert rows["norm"].bytes == 4 * (16 + 16) + 8  # and its statistics
    assert rows["conv"].latency.median > 0
    total = report.total
    assert total.parameters == sum(p.numel() for p in net.parameters())
    assert total.bytes == sum(t.numel() * t.element_size() for t in net.state_dict().values())
    assert total.flops == sum(r.flops for r in rows.values())
    assert (report.threads, report.device, total.kind) == (1, "cpu", "Net")
    assert net.training and not net._forward_hooks


def test_zeros_and_codes_are_counted() -> None:
    x = torch.rand(2, 3, 6, 6)
    compressed = CompressedModel.compress(Net(), Compose([Prune(0.25), Quantize("int8")]))
    rows, report = rows_of(compressed, x)
    for name in ("conv", "body.0"):
        encoded = compressed.theta[f"{name}.weight"]
        other = 0 if name == "conv" else 16 * 4
        assert rows[name].bytes == encoded.storage_bits / 8 + other
        assert rows[name].nonzeros == encoded.nnz + other / 4
        assert rows[name].effective_flops == pytest.approx(rows[name].flops * encoded.density)
    details = FLOPs(x).details(compressed)
    assert report.total.effective_flops == pytest.approx(details["value"])
    assert report.total.flops == details["dense"]


def test_recurrent_layers_and_attention_are_counted() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)
            self.attention = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.lstm(x)[0])

    rows, _ = rows_of(Sequence(), torch.rand(3, 5, 4))
    assert rows["lstm"].flops == 2 * 15 * 24 * (4 + 6)
    inner = sum(r.flops for n, r in rows.items() if n.startswith("attention"))
    # projections, scores and their sums, feed-forward
    assert inner == 2 * 15 * (6 * 18 + 6 * 6) + 2 * 3 * 2 * 2 * 25 * 3 + 2 * 15 * 2 * 6 * 12


def test_time_is_that_of_the_module_itself() -> None:
    class Slow(nn.Module):
        def __init__(self, seconds: float, inner: nn.Module | None = None) -> None:
            super().__init__()
            self.seconds, self.inner = seconds, inner

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(self.seconds)
            return x if self.inner is None else self.inner(x)

    rows, report = rows_of(Slow(0.002, Slow(0.006)), torch.rand(3, 2))
    assert 0.002 <= rows[""].latency.minimum <= rows[""].latency.median < 0.006
    assert 0.006 <= rows["inner"].latency.median < 0.02
    assert 0.008 <= report.total.latency.median < 0.03


def test_it_is_a_table_and_data() -> None:
    _, report = rows_of(Net(), torch.rand(2, 3, 6, 6))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["rows"][1]["name"] == "conv"
    assert data["total"]["latency"]["runs"] >= 10
    table = str(report)
    assert "body.0" in table and "effective" in table


def test_bad_arguments() -> None:
    x = torch.rand(1, 2)
    with pytest.raises(ValueError, match="threads must be"):
        profile(nn.Linear(2, 2), x, threads=0)
    with pytest.raises(ValueError, match="min_seconds must be positive"):
        profile(nn.Linear(2, 2), x, min_seconds=0)
    with pytest.raises(ValueError, match="a sparse model does is in its report"):
        profile(to_sparse(nn.Linear(2, 2), x), x)
