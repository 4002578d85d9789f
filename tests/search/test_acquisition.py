from __future__ import annotations

import itertools
import math

import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.optim.optimize import optimize_acqf_discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_condensa.search.acquisition import ILSUCB, KnownObjectiveCEI
from lightning_condensa.search.feasibility import Feasibility


class Table:
    """Members with given margins at the points 0, 1, 2, ..."""

    def __init__(self, margin: Tensor, weights: Tensor) -> None:
        self.margin = margin
        self.log_weights = (weights / weights.sum()).log()

    def feasibility(self, X: Tensor) -> Feasibility:  # noqa: N803
        return Feasibility(self.margin[:, X[..., 0].long()].movedim(0, -2), self.log_weights)

    def predict(self, X: Tensor, coverage: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:  # noqa: N803
        raise NotImplementedError


def draw(points: int, members: int, seed: int) -> tuple[Table, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    margin = 1.5 * torch.randn(members, points, generator=generator, dtype=torch.float64)
    weights = torch.rand(members, generator=generator, dtype=torch.float64) + 0.05
    utility = torch.randn(points, generator=generator, dtype=torch.float64)
    return Table(margin, weights), utility


def by_enumeration(model: Table, utility: Tensor, incumbent: float, points: list[int]) -> float:
    """Expected improvement over all members and all feasible/infeasible outcomes."""
    total = 0.0
    for weight, margin in zip(model.log_weights.exp(), model.margin, strict=True):
        p = torch.special.ndtr(margin[points])
        for outcome in itertools.product([False, True], repeat=len(points)):
            feasible = torch.tensor(outcome)
            chance = torch.where(feasible, p, 1 - p).prod()
            gains = [max(0.0, float(utility[i]) - incumbent) for i in points]
            best = max([g for g, ok in zip(gains, outcome, strict=True) if ok], default=0.0)
            total += float(weight * chance) * best
    return total


def at(points: list[int]) -> Tensor:
    return torch.tensor(points, dtype=torch.float64).unsqueeze(-1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    q=st.integers(1, 3),
    k=st.integers(0, 3),
    members=st.integers(1, 5),
    incumbent=st.floats(-2, 1),
)
def test_batch_formula_equals_enumeration(
    seed: int, q: int, k: int, members: int, incumbent: float
) -> None:
    model, utility = draw(q + k, members, seed)
    acquisition = KnownObjectiveCEI(
        model,
        lambda x: utility[x[..., 0].long()],
        incumbent,
        X_pending=at(list(range(q, q + k))) if k else None,
    )
    value = acquisition(at(list(range(q))).unsqueeze(0)).exp().item()
    assert value == pytest.approx(
        by_enumeration(model, utility, incumbent, list(range(q + k))), rel=1e-9, abs=1e-15
    )


def test_greedy_batch_through_botorch_uses_pending_and_avoids_done() -> None:
    model, utility = draw(points=12, members=4, seed=3)
    pending = [2, 5]
    done = [0, 1, *pending]
    acquisition = KnownObjectiveCEI(
        model, lambda x: utility[x[..., 0].long()], -2.0, X_pending=at(pending)
    )
    chosen, _ = optimize_acqf_discrete(
        acquisition, q=2, choices=at(list(range(12))), X_avoid=at(done)
    )
    picked: list[int] = []
    for _ in range(2):
        rest = [i for i in range(12) if i not in done + picked]
        picked.append(
            max(rest, key=lambda i: by_enumeration(model, utility, -2.0, [i, *picked, *pending]))
        )
    assert chosen[:, 0].long().tolist() == picked
    assert torch.equal(acquisition.X_pending, at(pending))


def test_a_batch_is_spread_by_what_its_points_share() -> None:
    # Two members disagree on everything: a second point that only works where the first does
    # is worth nothing, however probable it is.
    margin = torch.tensor([[40.0, 40.0, -40.0], [-40.0, -40.0, 40.0]], dtype=torch.float64)
    model = Table(margin, torch.tensor([0.6, 0.4], dtype=torch.float64))
    utility = torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64)
    acquisition = KnownObjectiveCEI(model, lambda x: utility[x[..., 0].long()], 0.0, at([0]))
    values = acquisition(at([1, 2]).unsqueeze(-2)).exp()
    assert values[0].item() == pytest.approx(0.6)
    assert values[1].item() == pytest.approx(0.6 + 0.4 * 0.8)


def test_hopeless_points_keep_an_order() -> None:
    margin = torch.tensor([[-50.0, -60.0, -70.0]], dtype=torch.float64)
    model = Table(margin, torch.ones(1, dtype=torch.float64))
    acquisition = KnownObjectiveCEI(model, lambda x: torch.ones(x.shape[:-1]).double(), 0.0)
    values = acquisition(at([0, 1, 2]).unsqueeze(-2))
    assert values.isfinite().all()
    assert values[0] > values[1] > values[2]


def test_no_improvement_is_minus_infinity() -> None:
    model, utility = draw(points=1, members=3, seed=0)
    acquisition = KnownObjectiveCEI(model, lambda x: utility[x[..., 0].long()], 10.0)
    assert acquisition(at([0]).unsqueeze(0)).item() == -math.inf


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95, 1.0])
def test_ils_ucb_is_its_formula(gamma: float) -> None:
    x = torch.linspace(0, 1, 6, dtype=torch.float64).unsqueeze(-1)
    model = SingleTaskGP(x, (3 * x).sin()).eval()
    grid = torch.linspace(0, 1, 11, dtype=torch.float64).reshape(-1, 1, 1)
    posterior = model.posterior(grid)
    expected = (1 - gamma) * posterior.variance.sqrt() - gamma * (posterior.mean - 0.7).abs()
    values = ILSUCB(model, level=0.7, gamma=gamma)(grid)
    torch.testing.assert_close(values, expected.flatten())


def test_ils_ucb_refuses_a_wrong_weight() -> None:
    model = SingleTaskGP(torch.rand(3, 1).double(), torch.rand(3, 1).double())
    with pytest.raises(ValueError, match="gamma must be in"):
        ILSUCB(model, level=0.5, gamma=1.5)
