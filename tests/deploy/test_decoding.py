"""Decoding straight into memory: the same as through tensors in between."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_condensa.deploy import CompressedModel, load_compressed
from lightning_condensa.deploy.decoding import look_up
from lightning_condensa.schemes import Compose, Prune, Quantize


@pytest.mark.parametrize("size", [1, 2, 17, 256])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_look_up_is_indexing(dtype: type[np.unsignedinteger], size: int) -> None:
    draw = np.random.default_rng(0)
    table = draw.integers(0, np.iinfo(dtype).max, size, dtype)
    # Around the number of pairs from which on a table of them pays, and odd.
    for count in (0, 1, 16 * size**2 - 1, 16 * size**2, 16 * size**2 + 1):
        indices = draw.integers(0, size, count).astype(np.uint8)
        out = np.zeros(count, dtype)
        look_up(table, indices, out)
        assert np.array_equal(out, table[indices])


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("density", [0.01, 0.6])  # with gaps, and without
def test_scaled_codes_are_decoded_bit_for_bit(
    density: float, symmetric: bool, granularity: str, tmp_path
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(700, 90), nn.Conv2d(12, 30, 3))
    quantize = Quantize("int8", granularity=granularity, symmetric=symmetric)
    compressed = CompressedModel.compress(module, Compose([Prune(density), quantize]))
    compressed.save(tmp_path / "m.condensa")
    fresh = nn.Sequential(nn.Linear(700, 90), nn.Conv2d(12, 30, 3))
    loaded = load_compressed(tmp_path / "m.condensa", fresh).state_dict()
    for name, encoded in compressed.theta.items():
        weight = encoded.decode()
        assert torch.equal(loaded[name].view(torch.int32), weight.view(torch.int32))
