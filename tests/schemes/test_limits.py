"""How far from its values training keeps a weight that is rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_condensa import Codebook, Compose, LowRank, Prune, Quantize
from lightning_condensa.schemes import Scheme
from lightning_condensa.schemes.bound import boundaries_of, bounded

FAR = torch.tensor([[-90.0, -0.5, 0.0, 0.5, 90.0, 1.0]])


def limited(scheme: Scheme, weight: list[float]) -> list[float]:
    """What is left of weights far off, where other weights were rounded."""
    module = nn.Linear(6, 1, bias=False)
    theta = scheme.bind(module).pi({"weight": torch.tensor([weight])})["weight"]
    (row,) = bounded(theta, FAR).tolist()
    return row  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("scheme", "weight", "low", "high"),
    [
        (Codebook(2), [-1.0, -1.0, -1.0, 3.0, 3.0, 3.0], -5, 7),
        (Codebook(3), [-1.0, -1.0, 2.0, 2.0, 3.0, 3.0], -4, 4),
        (Codebook(2), [4.0, 4.0, 4.0, 5.0, 5.0, 5.0], 0, 6),  # zero is never lifted
        (Quantize("binary"), [-2.0, 2.0, 2.0, -2.0, 1.0, 3.0], -6, 6),
        (Quantize("ternary"), [-2.0, 2.0, 2.0, 0.0, 0.0, 0.0], -4, 4),
        (Quantize("int2", symmetric=False), [-2.0, 1.0, 0.0, 0.0, 0.0, 0.0], -3, 2),
        (Quantize("int2", symmetric=False), [2.0, -1.0, 0.0, 0.0, 0.0, 0.0], -2, 3),
        (Quantize("int4"), [7.0, 1.0, 2.0, 3.0, 4.0, 5.0], -8, 8),
        (Compose([Prune(0.5), Codebook(2)]), [0.1, 0.1, 0.1, 4.0, 5.0, 5.0], 0, 6),
    ],
)
def test_one_step_beyond_the_outermost_values(
    scheme: Scheme, weight: list[float], low: float, high: float
) -> None:
    assert limited(scheme, weight) == pytest.approx(FAR.clamp(low, high)[0].tolist(), rel=1e-4)


def test_groups_have_limits_of_their_own() -> None:
    scheme = Quantize("binary", granularity="group:4")
    row = limited(scheme, [1.0, 1.0, -1.0, -1.0, 5.0, 5.0])
    assert row == pytest.approx([-3.0, -0.5, 0.0, 0.5, 15.0, 1.0])


@pytest.mark.parametrize(
    "scheme",
    [Codebook(1), Quantize("float16"), Quantize("float8_e4m3fn"), Prune(0.5), LowRank(rank=1)],
    ids=lambda s: s.describe(),
)
def test_no_limits(scheme: Scheme) -> None:
    assert limited(scheme, [1.0, -2.0, 3.0, -4.0, 5.0, -6.0]) == FAR[0].tolist()


def test_an_entry_that_nothing_is_rounded_to_stays_within_reach() -> None:
    # At zero it would come before the others, and what lies beyond them would be cut off.
    bound = Codebook(3).bind(nn.Linear(6, 1, bias=False))
    kept = boundaries_of(bound.pi({"weight": torch.tensor([[4.0, 4.0, 6.0, 6.0, 8.0, 8.0]])}))
    weight: dict[str, Tensor] = {"weight": torch.tensor([[4.0, 4.0, 6.0, 6.0, 6.0, 6.0]])}
    theta = bound.pi(weight, boundaries=kept)["weight"]
    assert theta.decode().unique().tolist() == [4, 6]
    weight["weight"][0, 5] = bounded(theta, torch.full((1, 6), 90.0))[0, 5]
    theta = bound.pi(weight, boundaries=kept)["weight"]
    assert theta.decode().unique().tolist() == [4, 6, weight["weight"][0, 5]]
