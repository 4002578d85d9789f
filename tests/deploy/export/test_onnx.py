from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_condensa import Codebook, Compose, CompressedModel, OnnxReport, Prune, Quantize
from lightning_condensa.deploy import export

from .networks import CASES, constants, evaluate, relative, run


def compressed(case: str, scheme: Any) -> CompressedModel:
    return CompressedModel.compress(CASES[case].network(), scheme)


@pytest.mark.parametrize("case", CASES)
def test_any_batch_gives_the_outputs_of_torch(case: str, tmp_path: Path) -> None:
    # A table in front of the weights: the same as without, and shown by the graph.
    model = compressed(case, Compose([Prune(0.6), Codebook(7)]))
    before = {name: t.clone() for name, t in model.module.state_dict().items()}
    report = model.to_onnx(tmp_path / "a.onnx", CASES[case].inputs(1))

    after = model.module.state_dict()
    assert model.module.training and all(torch.equal(after[n], t) for n, t in before.items())
    assert {layer.stored for layer in report.layers} == {"codebook"}
    assert report.bytes == (tmp_path / "a.onnx").stat().st_size
    onnx.checker.check_model(tmp_path / "a.onnx", full_check=True)
    assert b".py" not in (tmp_path / "a.onnx").read_bytes(), "no paths of this machine"
    for batch in (1, 3):
        x = CASES[case].inputs(batch)
        assert relative(run(tmp_path / "a.onnx", x), evaluate(model.module, x)) < 1e-5


@pytest.mark.parametrize("case", ["convolutions", pytest.param("encoder", marks=pytest.mark.slow)])
def test_half_precision_keeps_the_types_of_inputs_and_outputs(case: str, tmp_path: Path) -> None:
    model = compressed(case, Quantize("float16"))
    half = model.to_onnx(tmp_path / "b.onnx", CASES[case].inputs(2), "float16")
    x = CASES[case].inputs(5)
    output = run(tmp_path / "b.onnx", x)
    assert output.dtype == torch.float32
    error = relative(output, evaluate(model.module, x))
    assert 1e-6 < error < 5e-3, "neither float32 nor far off"
    assert "float32" not in {c.dtype.name for c in constants(tmp_path / "b.onnx").values()}
    assert {layer.stored for layer in half.layers} == {"float16"}


@pytest.mark.parametrize(
    ("scheme", "times"),
    [
        (Codebook(16), 8),
        (Compose([Prune(0.5), Codebook(16)]), 4),
        (Codebook(16, scope="global"), 8),
    ],
)
def test_codebooks_make_files_smaller(scheme: Any, times: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CompressedModel.compress(nn.Linear(1001, 99, bias=False), scheme)
    report = model.to_onnx(tmp_path / "a.onnx", torch.randn(2, 1001))
    assert report.bytes == pytest.approx(4 * 1001 * 99 / times, rel=0.02)
    x = torch.randn(3, 1001)
    assert relative(run(tmp_path / "a.onnx", x), evaluate(model.module, x)) < 1e-5


def test_more_values_than_a_byte_can_tell_stay_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scheme = Compose([Prune(0.9), Codebook(256)])
    model = CompressedModel.compress(nn.Linear(64, 64), scheme)
    assert len(model.module.weight.unique()) == 257
    report = model.to_onnx(tmp_path / "a.onnx", torch.randn(2, 64))
    assert report.layers[0].stored == "float32"
    x = torch.randn(3, 64)
    assert relative(run(tmp_path / "a.onnx", x), evaluate(model.module, x)) < 1e-5


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(8, 8), nn.Linear(8, 8)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.decode(self.encode(x).tanh() + bias)


def test_tied_weights_and_several_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CompressedModel.compress(Tied(), Codebook(16))
    # The second input has no batch: its first dimension stays what it is.
    report = model.to_onnx(tmp_path / "a.onnx", (torch.randn(2, 8), torch.randn(1, 8)))
    assert [(layer.name, layer.stored) for layer in report.layers] == [
        ("encode.weight", "codebook")
    ]
    x = (torch.randn(5, 8), torch.randn(1, 8))
    assert relative(run(tmp_path / "a.onnx", *x), evaluate(model.module, *x)) < 1e-5


def test_a_module_that_was_fitted_and_compiled(
    net: Callable[..., pl.LightningModule],
    trainer: Callable[..., pl.Trainer],
    loader: Any,
    tmp_path: Path,
) -> None:
    module = net()
    trainer(max_epochs=1).fit(module, loader)
    module.layers[0].eval()
    x = torch.randn(3, 8)
    expected = None
    for part in (module, torch.compile(module, backend="eager")):
        scheme = Codebook(4)
        theta = scheme.bind(part).pi(dict(part.named_parameters()))
        model = CompressedModel(part, theta, scheme)
        report = model.to_onnx(tmp_path / "a.onnx", torch.randn(1, 8))
        assert [layer.stored for layer in report.layers] == ["codebook", "codebook"]
        assert not module.layers[0].training and module.layers[1].training
        output = run(tmp_path / "a.onnx", x)
        expected = output if expected is None else expected
        assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0],), "example must be a tensor or a tuple of tensors"),
        (((),), "example must be a tensor or a tuple of tensors"),
        ((torch.tensor(1.0),), "example must hold a batch"),
        ((torch.zeros(0, 8),), "example must hold a batch"),
        ((torch.zeros(2, 8), "int4"), "precision must be one of"),
        ((torch.zeros(2, 8), "int8"), "precision='int8' needs calibration"),
        ((torch.zeros(2, 8), "float16", [torch.zeros(2, 8)]), "calibration is for"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    model = CompressedModel.compress(nn.Linear(8, 2), Quantize("int8"))
    with pytest.raises(ValueError, match=message):
        model.to_onnx(tmp_path / "a.onnx", *arguments)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = CompressedModel.compress(nn.Linear(8, 2), Quantize("int8"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    with pytest.raises(ImportError, match=r"onnxruntime: pip install lightning-condensa\[onnx\]"):
        model.to_onnx(tmp_path / "a.onnx", torch.zeros(2, 8))


def test_reports_are_tables_and_data() -> None:
    report = OnnxReport(1234, (export.OnnxLayer("head.weight", "float32", "not integer codes"),))
    assert "1,234 bytes" in str(report) and "not integer codes" in str(report)
    assert report.to_dict()["layers"][0]["stored"] == "float32"
