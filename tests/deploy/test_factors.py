"""Layers of low rank as two layers in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_condensa import (
    Add,
    Compose,
    CompressedModel,
    LowRank,
    Prune,
    Quantize,
    load_compressed,
    profile,
)


class Net(nn.Module):
    """Convolutions with all that changes a shape, a grouped one, and two heads that share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1, padding_mode="reflect", bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.wide = nn.Conv2d(24, 32, (3, 1), padding="same", dilation=2)
        self.grouped = nn.Conv2d(32, 32, 3, groups=2)
        self.hidden = nn.Linear(32, 40)
        self.first, self.second = nn.Linear(40, 24), nn.Linear(40, 24)
        self.second.weight = self.first.weight
        self.example_input_array = torch.randn(2, 3, 12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.grouped(torch.relu(self.wide(x)))).mean((2, 3))
        x = torch.relu(self.hidden(x))
        return torch.cat([self.first(x), self.second(x)], 1)


def compressed(scheme: Any) -> CompressedModel:
    torch.manual_seed(0)
    return CompressedModel.compress(Net().eval(), scheme)


def outputs(model: CompressedModel | nn.Module, x: Tensor) -> Tensor:
    module = model.module if isinstance(model, CompressedModel) else model
    with torch.no_grad():
        return module.eval()(x)


@pytest.mark.parametrize(
    "scheme",
    [
        LowRank(rank=3),
        LowRank(density=0.3),
        Compose([LowRank(rank=3), Quantize("int8")]),
        Compose([LowRank(rank=3), Quantize("int4", granularity="group:8")]),
        Compose([LowRank(rank=3), Quantize("float16")]),
    ],
    ids=["rank", "density", "int8", "groups", "float16"],
)
def test_outputs_are_the_same_with_fewer_multiplications(scheme: Any) -> None:
    model = compressed(scheme)
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    small = model.factorize()
    x = torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(outputs(small, x), outputs(model, x), rtol=1e-4, atol=1e-5)
    ours, dense = (profile(m, x).total for m in (small, model))
    assert ours.parameters < dense.parameters and ours.flops < dense.flops
    for name, encoding in small.theta.items():
        assert torch.equal(small.module.get_parameter(name), encoding.decode()), name
    for name, parameter in model.module.named_parameters():  # it is left as it was
        assert torch.equal(parameter, before[name])


def test_what_cannot_be_two_layers_says_why() -> None:
    small = compressed(LowRank(rank=3)).factorize()
    assert type(small.module.grouped) is nn.Conv2d and type(small.module.first) is nn.Linear
    assert small.stays["grouped.weight"] == "not two layers: its convolution has groups"
    assert small.stays["first.weight"] == "not two layers: other layers share it"
    report = str(small.report())
    assert "its convolution has groups" in report
    for path in ("stem", "wide", "hidden"):
        assert isinstance(small.module.get_submodule(path), nn.Sequential)


def test_code_that_reads_the_weight_keeps_its_layer() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 16)
    model = CompressedModel.compress(encoder.eval(), LowRank(rank=2))
    small = model.factorize(x)
    torch.testing.assert_close(outputs(small, x), outputs(model, x), rtol=1e-4, atol=1e-5)
    assert all(reason.startswith("not two layers: ") for reason in small.stays.values())
    changed = [n for n, m in small.module.named_modules() if isinstance(m, nn.Sequential)]
    assert len(changed) + len(small.stays) == len(model.theta)


def test_a_sum_is_not_a_product() -> None:
    model = compressed(Add([LowRank(rank=2), Prune(0.05)]))
    small = model.factorize()
    assert small.theta.keys() == model.theta.keys()
    x = model.module.example_input_array
    assert torch.equal(outputs(small, x), outputs(model, x))


def test_it_trains_on() -> None:
    small = compressed(LowRank(rank=3)).factorize()
    small.module.train()
    optimizer = torch.optim.Adam(small.module.parameters(), 0.01)
    x, y = torch.randn(16, 3, 12, 12), torch.randint(0, 3, (16,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(small.module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert small.module.stem[0].weight.grad is not None


def test_onnx_holds_the_codes_of_the_factors(tmp_path: Path) -> None:
    small = compressed(Compose([LowRank(rank=3), Quantize("int8")])).factorize()
    x = torch.randn(4, 3, 12, 12)
    report = small.to_onnx(tmp_path / "small.onnx", x, "int8", [x])
    stored = {layer.name: layer for layer in report.layers}
    assert stored["hidden.0.weight"].reason == stored["hidden.1.weight"].reason == ""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", options)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = outputs(small, x)
    assert (torch.from_numpy(found) - expected).norm() < 0.1 * expected.norm()


def test_the_file_is_that_of_the_model_before(tmp_path: Path) -> None:
    model = compressed(LowRank(rank=3))
    with pytest.raises(ValueError, match="save the model that this one was made from"):
        model.factorize().save(tmp_path / "small.condensa")
    model.save(tmp_path / "model.condensa")
    fresh = load_compressed(tmp_path / "model.condensa", Net())
    x = model.module.example_input_array
    torch.testing.assert_close(
        outputs(model.factorize(), x), outputs(fresh, x), rtol=1e-4, atol=1e-5
    )


def test_made_smaller_it_is_still_no_model_of_the_original_class(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].weight[:4] = net[0].bias[:4] = 0
    net.example_input_array = torch.zeros(1, 8)
    model = CompressedModel.compress(net, LowRank(rank=2, include=["2.weight"]))
    small = model.factorize().shrink()
    assert small.module[0].out_features == 4 and small.module[2][0].in_features == 4
    x = torch.randn(5, 8)
    torch.testing.assert_close(outputs(small, x), outputs(model, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="save the model that this one was made from"):
        small.save(tmp_path / "small.condensa")


def test_it_needs_an_example() -> None:
    model = CompressedModel.compress(nn.Sequential(nn.Linear(8, 8)), LowRank(rank=1))
    with pytest.raises(ValueError, match="factorize must run the model: pass example="):
        model.factorize()
