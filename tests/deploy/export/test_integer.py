from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_condensa import (
    Codebook,
    Compose,
    CompressedModel,
    FilterPrune,
    LowRank,
    Prune,
    Quantize,
)
from lightning_condensa.deploy.export.integer import channel_codes, positive
from lightning_condensa.schemes import Encoded

from .networks import CASES, constants, evaluate, relative, run, runtime


def exported(
    case: str, scheme: Any, path: Path, change: Callable[[nn.Module], None] = lambda m: None
) -> tuple[CompressedModel, Any]:
    module = CASES[case].network()
    change(module)
    model = CompressedModel.compress(module, scheme)
    batches = [CASES[case].inputs(64) for _ in range(3)]
    return model, model.to_onnx(path, CASES[case].inputs(1), "int8", batches)


def fused(path: Path) -> set[str]:
    """Operators of a file after the optimizations of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(path.with_suffix(".optimized")).graph.node}


@pytest.mark.parametrize(
    "scheme",
    [
        Quantize("int8"),
        Quantize("int8", symmetric=False),
        Compose([Prune(0.6), Quantize("int4")]),
        Quantize("ternary", granularity="tensor"),
    ],
)
def test_codes_and_scales_are_those_of_theta(scheme: Any, tmp_path: Path) -> None:
    model, report = exported("convolutions", scheme, tmp_path / "a.onnx")
    assert [layer.stored for layer in report.layers] == ["int8"] * 4
    stored = constants(tmp_path / "a.onnx")
    module: Any = model.module
    norms = {"first.weight": module.norm, "second.weight": module.other_norm}
    for name, encoded in model.theta.items():
        codes, scale = encoded.codes.int(), encoded.scale.flatten().expand(len(encoded.codes))
        if name in norms:
            norm = norms[name]
            scale = scale * (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
            assert (scale < 0).any() and (scale > 0).any(), "both signs are folded"
        stored_codes = torch.tensor(stored[f"{name}/codes"]).int()
        stored_scale = torch.tensor(stored[f"{name}/scale"])
        sign = torch.sign(scale * stored_scale)
        assert torch.equal(stored_codes, codes * sign.int().view(-1, *[1] * (codes.dim() - 1)))
        torch.testing.assert_close(stored_scale, scale * sign, rtol=1e-6, atol=0)
        assert (stored_scale > 0).all() or int(codes.min()) == -128
    onnx.checker.check_model(tmp_path / "a.onnx", full_check=True)
    nodes = onnx.load(tmp_path / "a.onnx").graph.node
    assert set(stored) <= {n for node in nodes for n in node.input}, "nothing is left over"
    rectifiers = [node for node in nodes if node.op_type in ("Relu", "Clip")]
    assert len(rectifiers) == 3
    assert not any("restored" in node.input[0] for node in rectifiers), "rounded once, behind them"
    kinds = fused(tmp_path / "a.onnx")
    assert {"QLinearConv", "QLinearAdd", "QGemm"} <= kinds, "integer kernels compute"
    assert not kinds & {"Conv", "Gemm", "Add", "Relu", "Clip", "BatchNormalization"}
    for batch in (1, 5):
        x = CASES["convolutions"].inputs(batch)
        assert relative(run(tmp_path / "a.onnx", x), evaluate(module, x)) < 0.02


def test_a_module_that_is_called_twice(tmp_path: Path) -> None:
    model, report = exported("perceptron", Quantize("int8"), tmp_path / "a.onnx")
    assert [layer.stored for layer in report.layers] == ["int8"] * 3
    stored = constants(tmp_path / "a.onnx")
    for name in ("twice.weight", "twice.weight/1"):
        assert np.array_equal(stored[f"{name}/codes"], model.theta["twice.weight"].codes.numpy())
    assert fused(tmp_path / "a.onnx") <= {"QuantizeLinear", "QGemm", "MatMulIntegerToFloat"}
    x = CASES["perceptron"].inputs(9)
    assert relative(run(tmp_path / "a.onnx", x), evaluate(model.module, x)) < 0.03


def test_a_transformer(tmp_path: Path) -> None:
    model, report = exported("encoder", Quantize("int8"), tmp_path / "a.onnx")
    assert {layer.stored for layer in report.layers} == {"int8"}
    assert "MatMulIntegerToFloat" in fused(tmp_path / "a.onnx")
    sums = [n for n in onnx.load(tmp_path / "a.onnx").graph.node if n.op_type == "Add"]
    assert not any("restored" in name for n in sums for name in n.input), "residuals stay exact"
    for batch in (1, 7):
        x = CASES["encoder"].inputs(batch)
        assert relative(run(tmp_path / "a.onnx", x), evaluate(model.module, x)) < 0.02


def test_what_cannot_be_int8_stays_float_and_says_why(tmp_path: Path) -> None:
    scheme = Compose([Quantize("int8", exclude=["ih"]), Codebook(4, include=["ih"])])
    model, report = exported("recurrent", scheme, tmp_path / "a.onnx")
    rows = {layer.name: (layer.stored, layer.reason) for layer in report.layers}
    assert rows == {
        "lstm.weight_ih_l0": ("codebook", "a codebook"),
        "lstm.weight_hh_l0": ("float32", "used by Slice"),
        "head.weight": ("int8", ""),
    }
    x = CASES["recurrent"].inputs(4)
    assert relative(run(tmp_path / "a.onnx", x), evaluate(model.module, x)) < 0.03


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Quantize("float16"), "not integer codes"),
        (Quantize("int8", granularity="group:4"), "not by output channel"),
    ],
)
def test_nothing_in_int8_is_an_error(scheme: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no weight can be computed with in int8.*{reason}"):
        exported("perceptron", scheme, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def silence(module: Any) -> None:
    module.norm.weight[:3] = 0.0
    module.norm.weight[3] = 1e-30
    module.norm.bias.fill_(0.3)


def test_channels_that_batch_norm_switches_off_keep_their_bias(tmp_path: Path) -> None:
    scheme = Compose([FilterPrune(0.5, prune_bias=False), Quantize("int8")])
    model, report = exported("convolutions", scheme, tmp_path / "a.onnx", silence)
    assert all(layer.stored == "int8" for layer in report.layers)
    stored = constants(tmp_path / "a.onnx")
    bias = stored["first.weight/bias/codes"] * stored["first.weight/bias/scale"]
    np.testing.assert_allclose(bias[:4], 0.3, rtol=1e-6)
    assert not stored["first.weight/codes"][:4].any()
    x = CASES["convolutions"].inputs(5)
    assert relative(run(tmp_path / "a.onnx", x), evaluate(model.module, x)) < 0.02


@torch.no_grad()
def overflow(module: Any) -> None:
    module.norm.weight[0] = 1e-3
    module.norm.bias[0] = 1e3


def test_a_bias_beyond_int32_leaves_a_layer_in_float(tmp_path: Path) -> None:
    model, report = exported("perceptron", Quantize("int8"), tmp_path / "a.onnx", overflow)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons == {
        "first.weight": "a bias is beyond the range of int32",
        "twice.weight": "",
        "last.weight": "",
    }
    x = CASES["perceptron"].inputs(5)
    assert relative(run(tmp_path / "a.onnx", x), evaluate(model.module, x)) < 0.03


def test_norms_that_are_pruned_are_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = CASES["convolutions"].network()
    module.example_input_array = CASES["convolutions"].inputs(2)
    model = CompressedModel.compress(module, Compose([FilterPrune(0.5), Quantize("int8")]))
    norms = [name for name, e in model.theta.items() if e.scale is None]
    assert norms
    batches = [CASES["convolutions"].inputs(64)]
    report = model.to_onnx(tmp_path / "a.onnx", CASES["convolutions"].inputs(1), "int8", batches)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert {name: reasons[name] for name in norms} == dict.fromkeys(norms, "not integer codes")
    assert not any(reason for name, reason in reasons.items() if name not in norms)
    assert "BatchNormalization" not in fused(tmp_path / "a.onnx")
    x = CASES["convolutions"].inputs(5)
    assert relative(run(tmp_path / "a.onnx", x), evaluate(model.module, x)) < 0.03


def test_low_rank_weights_are_multiplied_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scheme = Compose([LowRank(rank=2, include="first"), Quantize("int8")])
    model, report = exported("perceptron", scheme, tmp_path / "a.onnx")
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons == {
        "first.weight": "a sum or product of tensors",
        "twice.weight": "",
        "last.weight": "",
    }
    x = CASES["perceptron"].inputs(5)
    assert relative(run(tmp_path / "a.onnx", x), evaluate(model.module, x)) < 0.03


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_turning_signs_changes_no_weight(data: st.DataObject) -> None:
    codes = np.array(
        data.draw(st.lists(st.lists(st.integers(-128, 127), min_size=3, max_size=3), min_size=1)),
        np.int8,
    )
    numbers = st.floats(-4, 4, width=32)
    scale = np.array(data.draw(st.lists(numbers, min_size=len(codes), max_size=len(codes))))
    scale = scale.astype(np.float32)
    turned, positives = positive(codes, scale, axis=0)
    assert turned.dtype == np.int8 and positives.dtype == np.float32
    assert np.array_equal(turned * positives[:, None], codes * scale[:, None])
    assert ((positives >= 0) | (codes == -128).any(1)).all()
    other, same = positive(np.ascontiguousarray(codes.T), scale, axis=1)
    assert np.array_equal(other.T, turned) and np.array_equal(same, positives)


def test_other_types_have_no_channel_codes() -> None:
    codes, scale = torch.zeros(2, 3, dtype=torch.int8), torch.ones(2, 1)
    assert channel_codes(Encoded(codes, torch.float32, scale))[0].shape == (2, 3)
    for encoded in (
        Encoded(codes, torch.float16, scale),
        Encoded(codes.float(), torch.float32, scale),
        Encoded(codes, torch.float32, torch.ones(1, 3)),
    ):
        with pytest.raises(Exception, match=r"float16|not integer|not by output"):
            channel_codes(encoded)


class Hidden(nn.Module):
    """A transposed convolution, a bounded activation, and outputs in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(1, 4, 2, stride=2)
        self.conv = nn.Conv2d(4, 4, 3)
        self.last = nn.Conv2d(4, 2, 1)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(functional.hardtanh(self.up(x)))
        return self.norm(self.last(functional.hardtanh(x))), x


def test_other_layers_and_several_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CompressedModel.compress(Hidden(), Quantize("int8"))
    x = torch.randn(64, 1, 8, 8)
    report = model.to_onnx(tmp_path / "a.onnx", x, "int8", [x])
    assert [layer.reason for layer in report.layers] == ["used by ConvTranspose", "", ""]
    kinds = fused(tmp_path / "a.onnx")
    assert "QLinearConv" in kinds and not kinds & {"Conv", "FusedConv"}
    model.to_onnx(tmp_path / "float.onnx", x)
    names = [
        [output.name for output in onnx.load(tmp_path / file).graph.output]
        for file in ("a.onnx", "float.onnx")
    ]
    assert names[0] == names[1]
    found = runtime(tmp_path / "a.onnx").run(None, {"x": x.numpy()})
    outputs = [torch.from_numpy(y) for y in found]
    for ours, theirs in zip(evaluate(model.module, x), outputs, strict=True):
        assert relative(theirs, ours) < 0.02


class DigitsNet(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Digits(pl.LightningDataModule):
    def setup(self, stage: str | None = None) -> None:
        pixels, labels = load_digits(return_X_y=True)
        x = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        self.data = TensorDataset(x, torch.tensor(labels))

    def train_dataloader(self) -> DataLoader[Any]:
        rows = range(0, len(self.data), 2)
        return DataLoader(torch.utils.data.Subset(self.data, rows), 64, shuffle=True)


def test_accuracy_on_digits_is_that_of_torch(
    trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, data = DigitsNet(), Digits()
    trainer(max_epochs=5).fit(model, datamodule=data)
    x, y = data.data[1::2]
    compressed = CompressedModel.compress(model, Quantize("int8"))
    report = compressed.to_onnx(tmp_path / "a.onnx", x[:1], "int8", data)
    assert [layer.stored for layer in report.layers] == ["int8"] * 3
    # Nothing is taken out of integers on the way, pooling included.
    assert "DequantizeLinear" not in fused(tmp_path / "a.onnx")
    theirs, ours = run(tmp_path / "a.onnx", x), evaluate(compressed.module, x)
    accuracies = [float((logits.argmax(1) == y).float().mean()) for logits in (theirs, ours)]
    assert accuracies[1] > 0.95
    assert abs(accuracies[0] - accuracies[1]) <= 0.002
    assert relative(theirs, ours) < 0.02
    again = compressed.to_onnx(tmp_path / "b.onnx", x[:1], "int8", data)
    assert again == report
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
