from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_condensa.functional.quantization import cast, integer_codes, symmetric_scale

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12)


def finite_values(dtype: torch.dtype) -> Tensor:
    """Every finite value of a 16-bit type, ascending, as float64."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return every[every.isfinite()].double().unique()


HALVES = {dtype: finite_values(dtype) for dtype in (torch.float16, torch.bfloat16)}


@pytest.mark.parametrize("dtype", list(HALVES))
@given(value=FINITE | st.floats(-(2.0**-13), 2.0**-13, width=32) | st.floats(-7e4, 7e4, width=32))
@settings(max_examples=200, deadline=None)
def test_float_cast_is_the_nearest_representable(dtype: torch.dtype, value: float) -> None:
    result = cast(torch.tensor([value]), dtype)
    distance = (HALVES[dtype] - value).abs().min()
    assert result.isfinite().all()
    assert abs(result.double().item() - value) == distance.item()


@pytest.mark.parametrize("dtype", list(HALVES))
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_overflow_becomes_the_largest_finite_value(dtype: torch.dtype, source: torch.dtype) -> None:
    weight = torch.tensor([torch.finfo(source).max, -torch.finfo(source).max], dtype=source)
    largest = min(torch.finfo(dtype).max, torch.finfo(source).max)
    expected = torch.tensor([largest, -largest], dtype=torch.float64).to(dtype)
    assert torch.equal(cast(weight, dtype), expected)
    assert cast(weight, dtype).isfinite().all()


def test_a_zero_has_one_bit_pattern_and_the_input_is_left_alone() -> None:
    weight = torch.tensor([-0.0, -1e-30, 0.0, 1.0])
    result = cast(weight, torch.float16)
    assert result.view(torch.int16).tolist()[:3] == [0, 0, 0]
    assert math.copysign(1, weight[0].item()) == -1
    same = torch.tensor([-0.0, 7.0], dtype=torch.float16)
    cast(same, torch.float16)
    assert math.copysign(1, same[0].item()) == -1


def squared_error(rows: Tensor, scale: Tensor, levels: int) -> Tensor:
    codes = integer_codes(rows, scale, levels).double()
    return (codes * scale.double() - rows.double()).square().sum(1)


@given(ROWS, st.sampled_from([1, 7, 127]))
@settings(max_examples=200, deadline=None)
def test_scale_is_never_worse_than_min_max(row: list[float], levels: int) -> None:
    rows = torch.tensor([row])
    largest = rows.abs().amax(1, keepdim=True)
    minmax = torch.where(largest > 0, largest / levels, 1.0)
    ours = squared_error(rows, symmetric_scale(rows, levels), levels)
    theirs = squared_error(rows, minmax, levels)
    # 17 significant bits of the scale: 127 codes away that is 2⁻¹⁷ of the largest magnitude.
    slack = len(row) * (2.0**-16 * largest.double().item()) ** 2
    assert ours.sqrt().item() <= theirs.sqrt().item() + math.sqrt(slack) + 1e-38


def test_scale_beats_min_max_on_heavy_tails() -> None:
    rows = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) ** 3
    minmax = rows.abs().amax(1, keepdim=True) / 7
    better = squared_error(rows, symmetric_scale(rows, 7), 7) / squared_error(rows, minmax, 7)
    assert better.mean() < 0.95


@given(ROWS)
@settings(max_examples=100, deadline=None)
def test_codes_are_the_nearest(row: list[float]) -> None:
    rows = torch.tensor([row])
    scale = symmetric_scale(rows, 127)
    codes = integer_codes(rows, scale, 127)
    grid = torch.arange(-127, 128).double() * scale.double()
    distance = (rows.double().T - grid).abs()
    chosen = distance.gather(1, codes.long().T + 127).squeeze(1)
    tolerance = 1e-6 * scale.double().item()  # the division is done in float32
    assert torch.all(chosen <= distance.amin(1) + tolerance)


@given(st.lists(FINITE, min_size=1, max_size=8), st.sampled_from([7, 127]))
@settings(max_examples=300, deadline=None)
def test_rounding_again_changes_nothing(row: list[float], levels: int) -> None:
    rows = torch.tensor([row])
    scale = symmetric_scale(rows, levels)
    decoded = integer_codes(rows, scale, levels).float() * scale
    again = symmetric_scale(decoded, levels)
    assert torch.equal(integer_codes(decoded, again, levels).float() * again, decoded)


def test_zero_rows() -> None:
    scale = symmetric_scale(torch.zeros(2, 3), 127)
    assert scale.tolist() == [[1.0], [1.0]]
