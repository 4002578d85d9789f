"""Hidden units of recurrent layers are taken out, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_condensa import CompressedModel, HiddenPrune, load_compressed

from ..graph.networks import filled

INPUTS, UNITS = 5, 8


class Network(nn.Module):
    """A recurrent layer whose outputs and last states are both read."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(INPUTS, UNITS, batch_first=True, **options)
        width = (self.rnn.proj_size or UNITS) * (1 + self.rnn.bidirectional)
        self.head = nn.Linear(width, 3)
        self.example_input_array = torch.zeros(2, 4, INPUTS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.rnn(x)
        return self.head(outputs.mean(1))


OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "both directions": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_units_go_and_outputs_stay(
    kind: type[nn.RNNBase], options: dict[str, Any], tmp_path: Path
) -> None:
    module = filled(Network(kind, **options))
    compressed = CompressedModel.compress(module, HiddenPrune(0.5, scope="layer"))
    smaller = compressed.shrink()
    assert smaller.module.rnn.hidden_size == UNITS // 2
    shapes = {n: p.shape for n, p in smaller.module.rnn.named_parameters()}
    assert shapes["weight_hh_l0"][1] == UNITS // 2
    x = torch.randn(3, 6, INPUTS).double()
    with torch.no_grad():
        expected, found = compressed.module.eval()(x), smaller.module.eval()(x)
    assert float((expected - found).abs().max() / expected.abs().max()) <= 1e-12
    smaller.save(tmp_path / "small.condensa")
    loaded = load_compressed(tmp_path / "small.condensa", filled(Network(kind, **options)))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), found)


def test_layers_that_lose_different_numbers_keep_as_many_units() -> None:
    module = filled(Network(nn.LSTM, num_layers=2))
    with torch.no_grad():  # five units of the first layer, two of the second
        for layer, gone in ((0, 5), (1, 2)):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                own = getattr(module.rnn, f"{name}_l{layer}")
                own.view(4, UNITS, -1)[:, :gone] = 0
    smaller = CompressedModel(module, {}, HiddenPrune(0.5)).shrink()
    assert smaller.module.rnn.hidden_size == UNITS - 2
    x = torch.randn(3, 6, INPUTS).double()
    with torch.no_grad():
        torch.testing.assert_close(smaller.module.eval()(x), module.eval()(x), rtol=1e-12, atol=0)


def test_projected_states_stay() -> None:
    module = filled(Network(nn.LSTM, proj_size=4))
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(module.rnn, name).view(4, UNITS, -1)[:, :3] = 0
    smaller = CompressedModel(module, {}, HiddenPrune(0.5)).shrink()
    assert smaller.module.rnn.hidden_size == UNITS and not smaller.plan
