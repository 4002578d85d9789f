from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from launch import run_script
from torch import Tensor, nn

from lightning_condensa.deploy import CompressedModel, PackedFileError, load_compressed
from lightning_condensa.schemes import Compose, FilterPrune, NeuronPrune, Prune, Quantize, Scheme

MODULE = """
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.encode = nn.Linear(8, 8, bias=False)
        self.decode = nn.Linear(8, 8)
        self.decode.weight = self.encode.weight
        self.lstm = nn.LSTM(8, 5, batch_first=True)
        self.register_buffer("scale", torch.tensor(2.5, dtype=torch.float64))

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        return self.lstm(self.decode(self.encode(x).tanh()))[0] * self.scale.float()
"""

SECOND_PROCESS = """
import sys
import torch
from network import Network
from lightning_condensa import load_compressed
torch.manual_seed(1)
model = load_compressed(sys.argv[1] + "/model.condensa", Network()).eval()
x = torch.load(sys.argv[1] + "/input.pt", weights_only=True)
torch.save(model(x).detach(), sys.argv[1] + "/output.pt")
"""

SCHEMES = [
    Compose([Prune(0.1), Quantize("float16")]),
    Compose([Prune(0.3), Quantize("int8")]),
    Compose([FilterPrune(0.5), Prune(0.2), Quantize("bfloat16")]),
    Quantize("int8"),
]


def build(name: str = "Network") -> nn.Module:
    scope: dict[str, Any] = {"__name__": "network"}
    exec(MODULE, scope)
    torch.manual_seed(0)
    module: nn.Module = scope[name]()
    return module


def trained() -> nn.Module:
    """A network whose batch statistics are not the initial ones."""
    module = build().train()
    for _ in range(3):
        module(torch.rand(4, 3, 5, 5))
    return module.eval()


def test_a_second_process_gets_the_same_outputs(tmp_path: Path) -> None:
    compressed = CompressedModel.compress(trained(), SCHEMES[1])
    x = torch.rand(2, 3, 5, 5)
    compressed.save(tmp_path / "model.condensa")
    torch.save(x, tmp_path / "input.pt")
    (tmp_path / "network.py").write_text(MODULE)
    script = tmp_path / "second.py"
    script.write_text(SECOND_PROCESS)
    run_script(script, tmp_path)
    output = torch.load(tmp_path / "output.pt", weights_only=True)
    assert torch.equal(output, compressed.module(x))
    assert output.abs().sum() > 0


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.describe())
def test_save_and_load(scheme: Scheme, tmp_path: Path) -> None:
    compressed = CompressedModel.compress(trained(), scheme)
    size = compressed.save(tmp_path / "m.condensa")
    assert size == (tmp_path / "m.condensa").stat().st_size == compressed.file_bytes()
    fresh = load_compressed(tmp_path / "m.condensa", build())
    assert fresh.encode.weight is fresh.decode.weight
    expected = compressed.module.state_dict()
    for state in (fresh.state_dict(), compressed.state_dict()):
        assert set(state) == set(expected)
        for name, value in expected.items():
            assert state[name].dtype == value.dtype
            assert torch.equal(state[name], value), name
    assert int(fresh.norm.num_batches_tracked) == 3


def test_the_original_is_left_alone() -> None:
    module = trained()
    before = {n: v.clone() for n, v in module.state_dict().items()}
    compressed = CompressedModel.compress(module, Prune(0.1))
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())
    for name, encoded in compressed.theta.items():
        assert torch.equal(compressed.module.get_parameter(name), encoded.decode())


def test_a_file_of_another_module_says_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "m.condensa"
    CompressedModel.compress(nn.Sequential(nn.Linear(4, 3)), Prune(0.5)).save(path)
    for other, message in [
        (nn.Sequential(nn.Linear(4, 5)), r"of another shape: 0\.bias, 0\.weight"),
        (nn.Sequential(nn.Linear(4, 3, bias=False)), r"only in the file: 0\.bias"),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), r"missing from the file: 1\.bias"),
        (nn.ModuleDict({"a": nn.Linear(4, 3)}), r"missing from the file: a\.bias.*only in"),
    ]:
        before = {n: v.clone() for n, v in other.state_dict().items()}
        with pytest.raises(PackedFileError, match=message) as error:
            load_compressed(path, other)
        assert "\n" not in str(error.value)
        assert type(other).__name__ in str(error.value)
        assert all(torch.equal(v, before[n]) for n, v in other.state_dict().items())


def test_extra_state_that_is_no_tensor() -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

    compressed = CompressedModel.compress(Stateful(4, 3), Prune(0.5))
    with pytest.raises(ValueError, match="_extra_state in the module's state dict is dict"):
        compressed.packed()


def test_value_bytes_is_the_papers_count() -> None:
    module = nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4))
    nn.init.ones_(module[0].bias)
    compressed = CompressedModel.compress(module, Compose([Prune(0.25), Quantize("float16")]))
    assert compressed.value_bytes == 10 * 2 + 4 * 4 + 4 * 4  # β is zero


class Attached(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def test_the_trainer_is_not_copied() -> None:
    class Single(pl.Trainer):
        def __deepcopy__(self, memo: dict[int, Any]) -> None:
            raise AssertionError("the trainer was copied")

    module = Attached()
    module.trainer = Single(accelerator="cpu", logger=False, enable_checkpointing=False)
    compressed = CompressedModel.compress(module, Prune(0.5))
    assert compressed.theta["layer.weight"].nnz == 6
    assert module._trainer is not None


def test_a_named_criterion_is_saved_with_the_scheme(tmp_path: Path) -> None:
    scheme = NeuronPrune(0.5, criterion=spread)
    compressed = CompressedModel.compress(nn.Sequential(nn.Linear(4, 6)), scheme)
    compressed.save(tmp_path / "m.condensa")
    assert ".spread" in compressed.packed().metadata["scheme"]


def spread(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    return magnitudes.amax(1) - magnitudes.amin(1)


def test_repr() -> None:
    compressed = CompressedModel.compress(nn.Linear(4, 3), Prune(0.5))
    assert repr(compressed) == "CompressedModel(Linear, Prune(density=0.5))"
