from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_condensa.functional.masks import inside, numbers

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32]


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_inside_is_where(dtype: torch.dtype, data: st.DataObject) -> None:
    special = [-2.0, -0.0, 0.0, 1.0, 3.0]
    if dtype.is_floating_point:
        special += [math.nan, math.inf, -math.inf]
    count = data.draw(st.integers(0, 20))
    values = torch.tensor(
        data.draw(st.lists(st.sampled_from(special), min_size=count, max_size=count))
    ).to(dtype)
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool
    )
    found = inside(mask, values)
    assert found.dtype == dtype
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    expected = torch.where(mask, values, torch.zeros((), dtype=dtype))
    assert torch.equal(found.view(bits), expected.view(bits))
    assert torch.equal(numbers(mask, dtype), mask.to(dtype))


def test_any_layout() -> None:
    values = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    mask = torch.rand(2, 3, 4, 5) < 0.5
    for m in (mask, mask.to(memory_format=torch.channels_last), mask[:, :1].expand_as(mask)):
        assert torch.equal(inside(m, values), torch.where(m, values, 0))
        assert torch.equal(inside(m.mT, values.mT), torch.where(m, values, 0).mT)
