"""Outputs that are the same but for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_condensa.deploy.sparse.outputs import alike

INF, NAN = float("inf"), float("nan")


def numbers(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("ours", "wanted"),
    [
        (numbers(1.0005, 100.0), numbers(1.0, 100.0)),
        (numbers(INF, NAN, 1.0), numbers(INF, NAN, 1.0)),
        ({"a": [numbers(1.0), "text"]}, {"a": [numbers(1.0), "other text"]}),
        (numbers(), numbers()),
        (torch.tensor([2**40]), torch.tensor([2**40])),
    ],
)
def test_rounding_is_no_difference(ours: Any, wanted: Any) -> None:
    assert alike(ours, wanted, 1e-4)


@pytest.mark.parametrize(
    ("ours", "wanted"),
    [
        (numbers(1.02, 100.0), numbers(1.0, 100.0)),
        (numbers(2.0, INF), numbers(1.0, INF)),  # an infinity hides nothing
        (numbers(2.0, NAN), numbers(1.0, NAN)),
        (numbers(1.0, -INF), numbers(1.0, INF)),
        (numbers(1.0, 1.0), numbers(1.0, NAN)),
        (numbers(1.0, NAN), numbers(1.0, 1.0)),
        (numbers(1.0), numbers(1.0, 1.0)),
        (numbers(1.0), numbers(1.0, dtype=torch.float64)),
        (torch.tensor([2**40]), torch.tensor([2**40 + 1])),
        ((numbers(1.0), numbers(1.0)), (numbers(1.0), numbers(3.0))),
    ],
)
def test_more_than_rounding_is(ours: Any, wanted: Any) -> None:
    assert not alike(ours, wanted, 1e-4)
