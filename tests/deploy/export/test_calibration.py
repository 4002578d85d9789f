from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch.utils.data import DataLoader, TensorDataset

from lightning_condensa.deploy.export.calibration import Activation, calibrate, input_batches


def twice() -> bytes:
    """A model that gives twice its input ``x``, of any length, as ``y``."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "twice", [x], [y])
    opset = helper.make_opsetid("", 21)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def grid_of(values: np.ndarray, parts: int = 1) -> Activation:
    batches = [(torch.from_numpy(v),) for v in np.array_split(values, parts)]
    return calibrate(twice(), ["x"], batches)["x"]


def rounded(values: np.ndarray, grid: Activation) -> np.ndarray:
    codes = np.clip(np.rint(values / grid.scale) + grid.zero_point, 0, 255)
    return (codes - grid.zero_point) * grid.scale


def error(values: np.ndarray, grid: Activation) -> float:
    return float(((rounded(values, grid) - values) ** 2).mean())


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e6, 0), st.floats(0, 1e6))
def test_a_covering_grid_is_nowhere_off_by_more_than_a_step(low: float, high: float) -> None:
    grid = Activation.covering(low, high)
    assert grid.scale > 0 and 0 <= grid.zero_point <= 255
    values = np.linspace(low, high, 1000)
    assert np.abs(rounded(values, grid) - values).max() <= 1.001 * grid.scale
    assert rounded(np.zeros(1), grid)[0] == 0
    assert grid.amplitude >= max(-low, high) - grid.scale


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.sampled_from([0.0, 0.5, 3.0]), st.floats(1e-3, 1e3))
def test_grids_are_no_worse_than_covering_ones(seed: int, tail: float, size: float) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_normal(2000) * np.exp(tail * random.standard_normal(2000))
    values = (size * values).astype(np.float32)
    covering = Activation.covering(float(values.min()), float(values.max()))
    assert error(values, grid_of(values, parts=3)) <= 1.02 * error(values, covering)


def test_clipping_rare_values_pays() -> None:
    values = np.random.default_rng(0).laplace(size=50_000).astype(np.float32)
    grid = grid_of(values)
    covering = Activation.covering(float(values.min()), float(values.max()))
    assert error(values, grid) < 0.92 * error(values, covering)
    rectified = grid_of(np.maximum(values, 0))
    assert rectified.scale < 0.6 * covering.scale


def test_rectified_values_use_all_codes() -> None:
    values = np.abs(np.random.default_rng(0).standard_normal(1000)).astype(np.float32)
    assert grid_of(values).zero_point == 0
    assert grid_of(-values).zero_point == 255
    assert grid_of(values + 5).zero_point == 0, "zero is always on the grid"
    assert grid_of(np.zeros(5, np.float32)) == Activation(np.float32(1), 0)


def test_inputs_and_outputs_are_measured() -> None:
    x = torch.linspace(-1, 1, 255)
    grids = calibrate(twice(), ["x", "y"], [(x,), (0.5 * x[:7],)])
    assert grids["y"].scale == pytest.approx(2 * grids["x"].scale)
    assert grids["x"].scale == pytest.approx(2 / 255, rel=0.06)


def test_what_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="activations of y are not finite"):
        calibrate(twice(), ["x", "y"], [(torch.tensor([3e38]),)])


def test_batches_begin_with_the_inputs() -> None:
    x, y = torch.arange(4000.0).view(2000, 2), torch.arange(2000)
    loader = DataLoader(TensorDataset(x, y), 100, shuffle=True)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = input_batches(loader, 1), input_batches(loader, 1)
    assert torch.equal(torch.rand(1), expected), "the generator is left alone"
    assert [[t.shape for t in batch] for batch in first] == [[(100, 2)]] * 11
    assert all(torch.equal(a, b) for (a,), (b,) in zip(first, second, strict=True))
    assert len(input_batches(loader, 2)[0]) == 2
    assert len(input_batches([x, x], 1)) == 1, "1,024 samples are enough"


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "must be a LightningDataModule or an iterable"),
        (torch.zeros(3, 2), "must be a LightningDataModule or an iterable"),
        ([], "gave no samples"),
        ([{"x": torch.zeros(3)}], "batches that begin with the tensors"),
        ([[torch.zeros(3)]], "batches that begin with the tensors"),
        ([(torch.zeros(3), 1)], "batches that begin with the tensors"),
    ],
)
def test_other_data_is_refused(calibration: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        input_batches(calibration, 2)
