from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_condensa import Compose, Prune, Quantize
from lightning_condensa.lc import Lagrangian
from lightning_condensa.schemes import BoundScheme


def weights_of(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (5, 4), "1.weight": (3, 5)}
    return {
        n: nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64))
        for n, s in shapes.items()
    }


def bound_of(density: float) -> BoundScheme:
    network = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    return Prune(density).bind(network)


def moved(weights: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for w in weights.values():
            w.add_(torch.randn(w.shape, generator=generator, dtype=w.dtype), alpha=0.3)


class NaiveLC:
    """θ, λ and μ as written in the paper, one dense tensor each."""

    def __init__(self, weights: dict[str, Tensor], bound: BoundScheme, mu: float) -> None:
        self.bound, self.mu = bound, mu
        self.theta = bound.delta(bound.pi(weights))
        self.lam = {n: torch.zeros_like(t) for n, t in self.theta.items()}

    def c_step(self, weights: dict[str, Tensor], mu: float) -> None:
        w = {n: p.detach().clone() for n, p in weights.items()}
        if self.mu > 0:
            w = {n: p - self.lam[n] / self.mu for n, p in w.items()}
        self.theta = self.bound.delta(self.bound.pi(w))
        for n, p in weights.items():
            self.lam[n] = self.lam[n] - self.mu * (p.detach() - self.theta[n])
        self.mu = mu


@given(
    seed=st.integers(0, 10_000),
    mu=st.floats(1e-4, 1e3),
    growth=st.floats(1.0, 3.0),
    density=st.floats(0.1, 1.0),
    c_steps=st.integers(0, 4),
)
@settings(max_examples=40, deadline=None)
def test_penalty_gradient_is_that_of_the_augmented_lagrangian(
    seed: int, mu: float, growth: float, density: float, c_steps: int
) -> None:
    weights, bound = weights_of(seed), bound_of(density)
    lagrangian = Lagrangian(bound.pi(weights), mu)
    for i in range(c_steps):
        moved(weights, seed + i)
        lagrangian.c_step(weights, bound, lagrangian.mu * growth)
    moved(weights, seed + 99)

    lam, theta = lagrangian.multipliers(), bound.delta(lagrangian.theta)
    for n, w in weights.items():
        penalty = lagrangian.mu / 2 * (w - theta[n] - lam[n] / lagrangian.mu).square().sum()
        penalty.backward()
    expected = {n: w.grad.clone() for n, w in weights.items()}
    for w in weights.values():
        w.grad = torch.ones_like(w)  # the loss gradient, which stays
    lagrangian.add_penalty_gradient(weights)
    for n, w in weights.items():
        torch.testing.assert_close(w.grad - 1, expected[n], rtol=1e-8, atol=1e-9)


@given(seed=st.integers(0, 10_000), mu=st.floats(1e-3, 10.0), growth=st.floats(1.0, 3.0))
@settings(max_examples=25, deadline=None)
def test_c_steps_follow_the_formulas_while_mu_grows(seed: int, mu: float, growth: float) -> None:
    weights, bound = weights_of(seed), bound_of(0.4)
    ours, naive = Lagrangian(bound.pi(weights), mu), NaiveLC(weights, bound, mu)
    for i in range(6):
        moved(weights, seed + i)
        mu *= growth
        ours.c_step(weights, bound, mu)
        naive.c_step(weights, mu)
        assert ours.mu == naive.mu
        lam = ours.multipliers()
        for n in weights:
            torch.testing.assert_close(ours.theta[n].decode(), naive.theta[n])
            torch.testing.assert_close(lam[n], naive.lam[n], rtol=1e-8, atol=1e-9)
        assert any(bool((t.abs() > 1e-9).any()) for t in lam.values())


def test_without_mu_there_is_no_penalty_and_no_shift() -> None:
    weights, bound = weights_of(0), bound_of(0.3)
    lagrangian = Lagrangian(bound.pi(weights))
    for w in weights.values():
        w.grad = torch.zeros_like(w)
    lagrangian.add_penalty_gradient(weights)
    assert not any(bool(w.grad.any()) for w in weights.values())
    assert lagrangian.gradient_ratio(weights) is None
    assert all(torch.equal(t, weights[n]) for n, t in lagrangian.shifted(weights).items())


def test_only_some_parameters_are_touched() -> None:
    weights, bound = weights_of(0), bound_of(0.3)
    lagrangian = Lagrangian(bound.pi(weights), 1.0)
    first, second = weights.values()
    first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
    lagrangian.add_penalty_gradient(weights, only={id(second)})
    assert not first.grad.any()
    assert second.grad.any()
    first.grad = None  # unused in this step
    lagrangian.add_penalty_gradient(weights)
    assert first.grad is None


def test_untrained_parameters_have_no_multipliers() -> None:
    weights, bound = weights_of(0), bound_of(0.3)
    lagrangian = Lagrangian(bound.pi(weights), 1.0)
    for _ in range(5):
        lagrangian.c_step(weights, bound, 1.1 * lagrangian.mu, untrained={"0.weight"})
    lam = lagrangian.multipliers()
    torch.testing.assert_close(lam["0.weight"], torch.zeros_like(lam["0.weight"]))
    assert lam["1.weight"].any()


def test_gradient_ratio() -> None:
    weights, bound = weights_of(3), bound_of(0.5)
    lagrangian = Lagrangian(bound.pi(weights), 2.0)
    for w in weights.values():
        w.grad = torch.ones_like(w)
    before = copy.deepcopy({n: w.grad for n, w in weights.items()})
    ratio = lagrangian.gradient_ratio(weights)
    lagrangian.add_penalty_gradient(weights)
    penalty = torch.cat([(w.grad - before[n]).flatten() for n, w in weights.items()])
    loss = torch.cat([g.flatten() for g in before.values()])
    assert ratio == pytest.approx(float(penalty.norm() / loss.norm()))


@pytest.mark.parametrize("scheme", [Prune(0.3), Compose([Prune(0.5), Quantize("int8")])])
def test_state_survives_a_safe_file(scheme: Prune, tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    bound, weights = scheme.bind(network), dict(network.named_parameters())
    lagrangian = Lagrangian(bound.pi(weights), 0.7)
    with torch.no_grad():
        for w in weights.values():
            w.mul_(1.1)
    lagrangian.c_step(weights, bound, 0.9)
    torch.save(lagrangian.state_dict(), tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = Lagrangian.from_state(state, weights)
    assert other.mu == lagrangian.mu
    for n, encoded in lagrangian.theta.items():
        assert torch.equal(other.theta[n].decode(), encoded.decode())
        assert torch.equal(other.multipliers()[n], lagrangian.multipliers()[n])


def test_theta_does_not_follow_the_weights() -> None:
    # A cast to the type the weights already have must not make θ an alias of them.
    network = nn.Linear(4, 3).to(torch.bfloat16)
    bound, weights = Quantize("bfloat16").bind(network), dict(network.named_parameters())
    lagrangian = Lagrangian(bound.pi(weights))
    before = weights["weight"].detach().clone()
    with torch.no_grad():
        weights["weight"].zero_()
    assert torch.equal(lagrangian.theta["weight"].decode(), before)
    lagrangian.c_step(weights, bound, 1.0)
    with torch.no_grad():
        weights["weight"].fill_(1.0)
    assert not lagrangian.theta["weight"].decode().any()
