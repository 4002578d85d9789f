from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_condensa.functional import quantization
from lightning_condensa.functional.quantization import (
    cast,
    float_codes,
    grid_scale,
    held_scale,
    integer_codes,
    mean_scale,
    power_scale,
    sign_codes,
    threshold_of,
)

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


def squared_error(rows: Tensor, scale: Tensor, levels: int, low: int | None = None) -> Tensor:
    codes = integer_codes(rows, scale, -levels if low is None else low, levels).double()
    return (codes * scale.double() - rows.double()).square().sum(1)


@given(ROWS, st.sampled_from([1, 7, 127]))
@settings(max_examples=200, deadline=None)
def test_scale_is_never_worse_than_min_max(row: list[float], levels: int) -> None:
    rows = torch.tensor([row])
    largest = rows.abs().amax(1, keepdim=True)
    minmax = torch.where(largest > 0, largest / levels, 1.0)
    ours = squared_error(rows, grid_scale(rows, -levels, levels), levels)
    theirs = squared_error(rows, minmax, levels)
    # 17 significant bits of the scale: 127 codes away that is 2⁻¹⁷ of the largest magnitude.
    slack = len(row) * (2.0**-16 * largest.double().item()) ** 2
    assert ours.sqrt().item() <= theirs.sqrt().item() + math.sqrt(slack) + 1e-38


def test_scale_beats_min_max_on_heavy_tails() -> None:
    rows = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) ** 3
    minmax = rows.abs().amax(1, keepdim=True) / 7
    better = squared_error(rows, grid_scale(rows, -7, 7), 7) / squared_error(rows, minmax, 7)
    assert better.mean() < 0.95


@given(ROWS)
@settings(max_examples=100, deadline=None)
def test_codes_are_the_nearest(row: list[float]) -> None:
    rows = torch.tensor([row])
    scale = grid_scale(rows, -127, 127)
    codes = integer_codes(rows, scale, -127, 127)
    grid = torch.arange(-127, 128).double() * scale.double()
    distance = (rows.double().T - grid).abs()
    chosen = distance.gather(1, codes.long().T + 127).squeeze(1)
    tolerance = 1e-6 * scale.double().item()  # the division is done in float32
    assert torch.all(chosen <= distance.amin(1) + tolerance)


@given(st.lists(FINITE, min_size=1, max_size=8), st.sampled_from([7, 127]))
@settings(max_examples=300, deadline=None)
def test_rounding_again_changes_nothing(row: list[float], levels: int) -> None:
    rows = torch.tensor([row])
    scale = grid_scale(rows, -levels, levels)
    decoded = integer_codes(rows, scale, -levels, levels).float() * scale
    again = grid_scale(decoded, -levels, levels)
    assert torch.equal(integer_codes(decoded, again, -levels, levels).float() * again, decoded)


def test_zero_rows() -> None:
    scale = grid_scale(torch.zeros(2, 3), -127, 127)
    assert scale.tolist() == [[1.0], [1.0]]


# -- few bits ------------------------------------------------------------------------------------


def best_ternary_error(row: Tensor) -> float:
    """The least squared error of {−s, 0, s}, by trying every number of non-zeros (TWN, eq. 9)."""
    ordered = row.double().abs().sort(descending=True).values
    counts = torch.arange(1, len(ordered) + 1)
    gain = ordered.cumsum(0).square() / counts
    return float(ordered.square().sum() - gain.max())


TAILS = {
    "normal": lambda x: x,
    "uniform": lambda x: torch.erf(x),
    "heavy": lambda x: x**3,
    "sparse": lambda x: x * (x.abs() > 1.6),
    "two sided": lambda x: x.sign() + 0.1 * x,
}


@pytest.mark.parametrize("tail", list(TAILS))
def test_ternary_is_close_to_the_best(tail: str) -> None:
    rows = TAILS[tail](torch.randn(20, 400, generator=torch.Generator().manual_seed(0)))
    error = squared_error(rows, grid_scale(rows, -1, 1), 1)
    best = torch.tensor([best_ternary_error(row) for row in rows])
    assert torch.all(error <= 1.01 * best + 1e-9)


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-2, 1), (-7, 7), (-8, 7)])
@pytest.mark.parametrize("tail", list(TAILS))
def test_scale_is_close_to_the_best_of_many(tail: str, low: int, high: int) -> None:
    rows = TAILS[tail](torch.randn(10, 300, generator=torch.Generator().manual_seed(1)))
    found = squared_error(rows, grid_scale(rows, low, high), high, low)
    signs = (1, -1) if low != -high else (1,)
    tried = [
        squared_error(rows, sign * share * rows.abs().amax(1, keepdim=True), high, low)
        for sign in signs
        for share in torch.linspace(0.005, 1.1, 800).tolist()
    ]
    best = torch.stack(tried).amin(0)
    # Scales are 6 % apart for four bits; and the sign of the larger side need not be the best.
    assert torch.all(found <= (1.3 if low == -high else 1.35) * best + 1e-9)
    assert found.sum() <= (1.06 if low == -high else 1.12) * best.sum() + 1e-9


@given(ROWS, st.sampled_from([(-1, 1), (-2, 1), (-7, 7), (-8, 7), (-128, 127)]))
@settings(max_examples=300, deadline=None)
def test_rounding_few_bits_again_changes_nothing(row: list[float], grid: tuple[int, int]) -> None:
    rows = torch.tensor([row])

    def decoded(values: Tensor) -> Tensor:
        scale = grid_scale(values, *grid)
        return integer_codes(values, scale, *grid).float() * scale

    once = decoded(rows)
    assert torch.equal(decoded(once), once)


@given(ROWS, st.sampled_from([0.25, 1.0, 8.0]))
@settings(max_examples=300, deadline=None)
def test_a_threshold_that_is_held(row: list[float], factor: float) -> None:
    rows = torch.tensor([row])
    scale = grid_scale(rows, -1, 1)
    threshold = threshold_of(rows, scale)
    codes, held = held_scale(factor * rows, threshold)
    expected = integer_codes(rows, scale, -1, 1)
    border = scale.double() / 2
    clear = ((rows.double().abs() - border).abs() > 1e-5 * border) | (rows == 0)
    if rows.abs().max() > 1e-30:
        assert torch.equal(codes[clear], expected[clear])
    chosen = rows[codes != 0].double().abs()
    if len(chosen) and chosen.mean() > 1e-30:
        # For given codes the mean magnitude is the scale of least error.
        assert held.item() == pytest.approx(factor * chosen.mean().item(), rel=1e-5)
    else:
        assert not codes.any() or held.item() == pytest.approx(factor * scale.item())


def test_a_threshold_of_zeros_lets_weights_come_back() -> None:
    zeros = torch.zeros(1, 4)
    threshold = threshold_of(zeros, grid_scale(zeros, -1, 1))
    codes, scale = held_scale(torch.tensor([[0.0, 3.0, -3.0, 0.1]]), threshold)
    assert codes.tolist() == [[0, 1, -1, 0]]
    assert scale.item() == 3
    codes, scale = held_scale(zeros, threshold)
    assert not codes.any()
    assert scale.item() == 1


@given(ROWS)
@settings(max_examples=200, deadline=None)
def test_signs_times_the_mean_are_the_nearest(row: list[float]) -> None:
    rows = torch.tensor([row])
    sizes = torch.tensor([[float(len(row))]])
    scale, codes = mean_scale(rows, sizes), sign_codes(rows)
    assert set(codes.unique().tolist()) <= {-1, 1}
    error = (codes.double() * scale.double() - rows.double()).square().sum()
    mean = rows.double().abs().mean()
    best = (rows.double().abs() - mean).square().sum()
    if mean > 1e-30:
        assert error <= best * (1 + 1e-9) + len(row) * (mean * 2**-16) ** 2
    again = codes.float() * scale
    assert torch.equal(mean_scale(again, sizes) * sign_codes(again), again)


def test_a_mean_counts_what_has_a_code() -> None:
    rows = torch.tensor([[2.0, 0.0, 0.0, 4.0]])
    assert mean_scale(rows, torch.tensor([[2.0]])).item() == 3
    assert mean_scale(rows, torch.tensor([[4.0]])).item() == 1.5
    assert mean_scale(0 * rows, torch.tensor([[0.0]])).item() == 1


EIGHT = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).double()
EIGHT = EIGHT[EIGHT.isfinite()].unique()


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_float8_is_the_nearest_under_its_scale(row: list[float]) -> None:
    rows = torch.tensor([row])
    scale = power_scale(rows, torch.float8_e4m3fn)
    codes = cast(rows / scale, torch.float8_e4m3fn)
    assert math.log2(scale.item()).is_integer()
    largest = rows.abs().max().item()
    assert largest <= 448 * scale.item()
    if largest > 1e-30:
        assert largest > 224 * scale.item()  # the least power of two
    distance = (EIGHT[:, None] * scale.double() - rows.double()).abs().amin(0)
    assert torch.equal((codes.double() * scale.double() - rows.double()).abs()[0], distance)
    assert not torch.any(codes.view(torch.uint8) == 128)  # no −0
    decoded = codes.float() * scale
    again = power_scale(decoded, torch.float8_e4m3fn)
    assert torch.equal(cast(decoded / again, torch.float8_e4m3fn).float() * again, decoded)


@pytest.mark.parametrize("shape", [(7, 5), (2, 40), (30, 1), (1, 33), (0, 4), (3, 0)])
def test_pieces_change_nothing(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows and columns: as if all were in one piece."""
    torch.manual_seed(0)
    rows = torch.randn(shape).pow(3)

    def found() -> list[Tensor]:
        results = []
        for low, high in ((-1, 1), (-8, 7), (-127, 127)):
            scale = grid_scale(rows, low, high)
            results += [scale, integer_codes(rows, scale, low, high)]
        scale = power_scale(rows, torch.float8_e4m3fn)
        return [*results, scale, float_codes(rows, scale, torch.float8_e4m3fn).float()]

    whole = found()
    monkeypatch.setattr(quantization, "chunk_length", lambda rows: 4)  # pieces of eight
    assert all(map(torch.equal, found(), whole))


def test_codes_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 200_000)
    scale = grid_scale(rows, -7, 7)
    assert torch.equal(
        integer_codes(rows, scale, -7, 7), (rows / scale).round().clamp(-7, 7).to(torch.int8)
    )
    scale = power_scale(rows, torch.float8_e4m3fn)
    ours = float_codes(rows, scale, torch.float8_e4m3fn)
    assert torch.equal(ours.float(), (rows / scale).to(torch.float8_e4m3fn).float())
