"""Latency and throughput in other engines than eager PyTorch."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from lightning_condensa import CompressedModel, Latency, Prune, Throughput
from lightning_condensa.deploy.engines import prepare

CPU = torch.device("cpu")


class Two(nn.Module):
    """Two inputs and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(12, 9)
        self.right = nn.Linear(7, 9)
        self.drop = nn.Dropout(0.9)

    def forward(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        return self.drop(torch.relu(self.left(x)) + scale * self.right(y))


@pytest.mark.parametrize(
    "engine",
    ["eager", pytest.param("compile", marks=pytest.mark.slow), "onnxruntime", "sparse"],
)
def test_engines_compute_the_same(engine: str) -> None:
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    module = CompressedModel.compress(Two(), Prune(0.2)).module.train()
    inputs = (torch.rand(3, 12), torch.rand(3, 7), 0.5)
    ours = prepare(module, inputs, engine, 1, CPU)()  # type: ignore[arg-type]
    ours = torch.from_numpy(ours[0]) if engine == "onnxruntime" else ours
    assert module.training
    with torch.no_grad():
        wanted = module.eval()(*inputs)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_sparse_latency_falls_with_density() -> None:
    dense = CompressedModel.compress(nn.Linear(1024, 1024), Prune(1.0))
    sparse = CompressedModel.compress(nn.Linear(1024, 1024), Prune(0.01))
    x = torch.rand(8, 1024)
    settings = {"threads": 1, "min_seconds": 0.05, "engine": "sparse"}
    latency, throughput = Latency(x, **settings), Throughput(x, **settings)  # type: ignore[arg-type]
    assert latency.details(sparse)["engine"] == "sparse"
    assert latency(sparse) < latency(dense) / 1.5
    assert throughput(sparse) > throughput(dense) * 1.5


def test_a_missing_package_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    objective = Latency(torch.rand(1, 2), engine="onnxruntime")
    with pytest.raises(ImportError, match=r"pip install 'lightning-condensa\[onnx\]'"):
        objective(CompressedModel.compress(nn.Linear(2, 2), Prune(0.5)))


def test_bad_engines() -> None:
    with pytest.raises(ValueError, match=r"engine must be one of .*'sparse'.*, got 'tvm'"):
        Latency(engine="tvm")  # type: ignore[arg-type]
    compressed = CompressedModel.compress(nn.Linear(2, 2), Prune(0.5))
    with pytest.raises(ValueError, match="engine='sparse' runs on the CPU, got device='meta'"):
        Latency(torch.rand(1, 2), engine="sparse", device="meta")(compressed)
