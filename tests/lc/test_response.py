from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_condensa.lc import OptimizerResponse

LR = 0.05
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def measured(make: Make, gradient: Tensor) -> OptimizerResponse:
    parameter = nn.Parameter(torch.zeros_like(gradient))
    optimizer = make([parameter])
    parameter.grad = gradient.clone()
    response = OptimizerResponse()
    response.before_step(optimizer, {"w": parameter})
    optimizer.step()
    assert response.after_step({"w": parameter})
    return response


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.SGD(p, lr=LR), 1.0),
        (lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9), 1.0),
        (lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True), 1.9),
    ],
)
def test_sgd_moves_by_the_gradient(make: Make, expected: float) -> None:
    response = measured(make, torch.randn(50, generator=torch.Generator().manual_seed(0)))
    assert response.response == pytest.approx(expected, rel=1e-4)
    assert response.mu_of_unit_rate == pytest.approx(1 / (LR * expected), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_adam_moves_by_the_sign_of_the_gradient(scale: float) -> None:
    gradient = scale * torch.randn(200, generator=torch.Generator().manual_seed(0))
    response = measured(lambda p: torch.optim.Adam(p, lr=LR), gradient)
    assert response.response == pytest.approx(1 / float(gradient.square().mean().sqrt()), rel=1e-2)


def test_a_unit_rate_closes_the_gap_in_one_sgd_step() -> None:
    gradient = torch.randn(20, generator=torch.Generator().manual_seed(0))
    mu = measured(lambda p: torch.optim.SGD(p, lr=LR), gradient).mu_of_unit_rate
    w = nn.Parameter(torch.randn(20))
    target = torch.randn(20)
    w.grad = mu * (w.detach() - target)
    torch.optim.SGD([w], lr=LR).step()
    torch.testing.assert_close(w.detach(), target, rtol=1e-4, atol=1e-5)


def test_a_skipped_step_measures_nothing_and_the_next_is_tried() -> None:
    w = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([w], lr=LR)
    response = OptimizerResponse()
    for gradient in (torch.full((4,), math.inf), torch.zeros(4)):
        w.grad = gradient
        response.before_step(optimizer, {"w": w})
        assert not response.after_step({"w": w})
        assert response.mu_of_unit_rate == 0
    w.grad = None
    response.before_step(optimizer, {"w": w})
    assert not response.after_step({"w": w})
    w.grad = torch.ones(4)
    response.before_step(optimizer, {"w": w})
    optimizer.step()
    assert response.after_step({"w": w})
    assert response.response == pytest.approx(1.0)


def test_the_largest_learning_rate_counts() -> None:
    w = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([w], lr=1e-6)
    response = OptimizerResponse()
    for lr in (1e-6, 0.5, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.ones(4)
        response.before_step(optimizer, {"w": w})
        optimizer.step()
        response.after_step({"w": w})
    assert response.mu_of_unit_rate == pytest.approx(1 / 0.5, rel=1e-3)
    copy = OptimizerResponse.from_state(response.state_dict())
    assert copy.mu_of_unit_rate == response.mu_of_unit_rate


def test_optimizers_of_other_parameters_are_ignored() -> None:
    w, other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    w.grad = other.grad = torch.ones(4)
    response = OptimizerResponse()
    response.before_step(torch.optim.SGD([other], lr=9.0), {"w": w})
    assert not response.after_step({"w": w})
    assert response.mu_of_unit_rate == 0


def test_each_of_two_optimizers_is_measured_on_its_own_parameters() -> None:
    # As in a GAN: both step in one batch, and gradients of the first are still there.
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    both = {"a": a, "b": b}
    a.grad, b.grad = torch.full((4,), 100.0), torch.ones(4)
    response = OptimizerResponse()
    for optimizer in (torch.optim.SGD([a], lr=LR), torch.optim.SGD([b], lr=LR)):
        response.before_step(optimizer, both)
        optimizer.step()
    assert response.after_step(both)
    assert response.response == pytest.approx(1.0)
