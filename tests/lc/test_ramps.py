from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_condensa.lc import LCSchedule, PolynomialRamp
from lightning_condensa.lc.ramps import as_ramp

shares = st.floats(0, 1)


@given(power=st.floats(1, 50), t=shares, later=shares)
def test_polynomial_ramps_rise_from_0_to_1(power: float, t: float, later: float) -> None:
    ramp = PolynomialRamp(power)
    assert ramp(0) == 0
    assert ramp(1) == 1
    first, second = sorted((t, later))
    assert 0 <= ramp(first) <= ramp(second) <= 1


@given(power=st.floats(1, 50), steeper=st.floats(1, 50), t=shares)
def test_a_higher_power_is_further_on_the_way(power: float, steeper: float, t: float) -> None:
    low, high = sorted((power, steeper))
    assert PolynomialRamp(low)(t) <= PolynomialRamp(high)(t) + 1e-12


def test_known_shapes() -> None:
    assert PolynomialRamp(1)(0.3) == pytest.approx(0.3)
    assert PolynomialRamp()(0.5) == 1 - 0.5**3  # Zhu & Gupta's cubic
    assert as_ramp(2) == PolynomialRamp(2)
    assert as_ramp(5.0) == PolynomialRamp(5)


@pytest.mark.parametrize("power", [0, 0.99, -1, math.nan, math.inf, "3", None])
def test_powers_out_of_range_are_refused(power: Any) -> None:
    with pytest.raises(ValueError, match="power must be a number >= 1"):
        PolynomialRamp(power)


def smoothstep(t: float) -> float:
    return t * t * (3 - 2 * t)


def test_functions_are_ramps() -> None:
    assert as_ramp(smoothstep) is smoothstep
    assert as_ramp(lambda t: float(t > 0.5))(0.4) == 0  # a jump turns nowhere back
    plan = LCSchedule(l_steps=4, shape=smoothstep, finetune=0.0).plan(100)
    assert plan.progress == pytest.approx([smoothstep(i / 4) for i in range(5)])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (lambda t: 1 - t, "got 1 at 0, 0.5 at 0.5 and 0 at 1"),
        (lambda t: t / 2, "got 0 at 0, 0.25 at 0.5 and 0.5 at 1"),
        (lambda t: 0.1 + 0.9 * t, "shape must rise from 0 at 0"),
        (lambda t: 2 * t, "to 1 at 1"),
        (lambda t: t + math.sin(6 * math.pi * t), "shape must rise"),
        (lambda t: math.nan, "shape must rise"),
        ("cubic", "shape must be a power or a function"),
        (None, "shape must be a power or a function"),
        (True, "shape must be a power or a function"),
        (0.5, "power must be a number >= 1"),
    ],
)
def test_what_is_no_ramp_is_refused(shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_ramp(shape)
    with pytest.raises(ValueError, match=message):
        LCSchedule(shape=shape)
