from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from botorch.exceptions.errors import ModelFittingError
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_condensa.search import surrogates
from lightning_condensa.search.cliff import CliffCurves, thin
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.surrogates import BilogGP, CliffEnsemble, bilog


def make_problem(d: int = 1, cliff: bool = True, z: float = 0.0) -> Problem:
    if d == 1:
        candidates = torch.linspace(0.05, 5.0, 60, dtype=torch.float64).unsqueeze(-1)
    else:
        axis = torch.linspace(0.05, 3.0, 8, dtype=torch.float64)
        candidates = torch.cartesian_prod(*[axis] * d)
    dense = Observation(torch.zeros(d), metric=0.95, variance=1e-6, utility=0.0)
    return Problem(candidates, candidates.mean(-1), dense, 0.94, 1e-6, cliff=cliff, z=z)


def seen(u: float, metric: float | None) -> Observation:
    return Observation(torch.tensor([u]), metric, 1e-6, u, diverged=metric is None)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), u_max=st.floats(0.01, 8))
def test_prior_curves_start_at_zero_and_fall_to_their_depth(seed: int, u_max: float) -> None:
    curves = CliffCurves.prior(200, u_max, torch.Generator().manual_seed(seed))
    ends = curves.drop(torch.tensor([0.0, 1e3], dtype=torch.float64))
    assert ends.shape == (200, 2)
    assert torch.equal(ends[:, 0], torch.zeros(200, dtype=torch.float64))
    at_foot = curves.depth + 1.5 * curves.slope
    assert ((ends[:, 1] - at_foot).abs() < 1e-6).all()
    assert (curves.location > 0).all() and (curves.power >= 1.5).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 400), count=st.integers(1, 100))
def test_thinning_keeps_heavy_members_and_the_number(seed: int, size: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_weights = 3 * torch.randn(size, generator=generator, dtype=torch.float64)
    index, kept = thin(log_weights, count, generator)
    assert len(set(index.tolist())) == len(index) <= count + 1
    assert kept.exp().sum().item() == pytest.approx(1.0)
    assert int(log_weights.argmax()) in index or count < size


def test_thinning_is_unbiased() -> None:
    log_weights = torch.linspace(-3, 1, 50, dtype=torch.float64)
    values = torch.sin(torch.arange(50, dtype=torch.float64))
    exact = (torch.softmax(log_weights, 0) * values).sum().item()
    estimates = []
    for seed in range(4000):
        index, kept = thin(log_weights, 10, torch.Generator().manual_seed(seed))
        estimates.append(float((kept.exp() * values[index]).sum()))
    spread = torch.tensor(estimates).std().item() / math.sqrt(len(estimates))
    assert abs(sum(estimates) / len(estimates) - exact) < 5 * spread + 1e-4


def test_ensemble_follows_the_data() -> None:
    problem = make_problem()
    history = [seen(1.5, 0.949), seen(2.5, 0.945), seen(3.5, 0.60)]
    model = CliffEnsemble(problem, history, seed=1)
    centre, low, high = model.predict(torch.tensor([[0.0], [1.5], [2.5], [3.5]]).double())
    assert centre[0].item() == pytest.approx(0.95)
    assert centre[1:3].tolist() == pytest.approx([0.949, 0.945], abs=0.004)
    assert abs(centre[3].item() - 0.60) < 0.1
    assert bool((low <= centre + 1e-9).all() and (centre <= high + 1e-9).all())
    probability = model.feasibility(torch.tensor([[1.0], [4.5]]).double()).probability
    assert probability[0] > 0.9 and probability[1] < 0.05


def test_ensemble_posterior_is_weighted_like_its_feasibility() -> None:
    problem = make_problem()
    model = CliffEnsemble(problem, [seen(2.0, 0.93)], seed=0)
    grid = problem.candidates
    torch.testing.assert_close(model.posterior(grid).mean[:, 0], model.predict(grid)[0])
    assert model.feasibility(grid).margin.shape == (len(model.curves), len(grid))


def test_divergence_is_evidence_against_the_point_and_beyond() -> None:
    problem = make_problem()
    probe = torch.tensor([[0.5], [3.0], [4.0]]).double()
    before = CliffEnsemble(problem, [], seed=0).feasibility(probe).probability
    after = CliffEnsemble(problem, [seen(3.0, None)], seed=0).feasibility(probe).probability
    assert after[1] < 0.15 < before[1]
    assert after[2] < 0.05
    assert after[0] > 0.3


def test_ensemble_depends_only_on_its_seed() -> None:
    problem = make_problem()
    torch.manual_seed(0)
    a = CliffEnsemble(problem, [seen(2.0, 0.9)], seed=3)
    torch.manual_seed(1)
    b = CliffEnsemble(problem, [seen(2.0, 0.9)], seed=3)
    c = CliffEnsemble(problem, [seen(2.0, 0.9)], seed=4)
    assert torch.equal(a.forward(problem.candidates), b.forward(problem.candidates))
    assert not torch.equal(a.curves.location[:100], c.curves.location[:100])


def test_margin_lowers_feasibility() -> None:
    history = [seen(2.0, 0.942)]
    probe = torch.tensor([[2.0]]).double()
    plain, strict = (
        CliffEnsemble(make_problem(z=z), history, seed=0).feasibility(probe).probability.item()
        for z in (0.0, 3.0)
    )
    assert strict < plain


def test_ensemble_refuses_other_problems() -> None:
    with pytest.raises(ValueError, match="cliff=True"):
        CliffEnsemble(make_problem(cliff=False), [], seed=0)


@given(st.floats(-1e3, 1e3))
def test_bilog_is_odd_and_monotone(value: float) -> None:
    x = torch.tensor([value, -value, value + 1.0], dtype=torch.float64)
    y = bilog(x)
    assert y[0].item() == pytest.approx(-y[1].item())
    assert y[2] > y[0]


def test_gp_interpolates_on_the_metric_scale() -> None:
    problem = make_problem(cliff=False)
    history = [seen(1.0, 0.949), seen(2.0, 0.941), seen(3.0, 0.90), seen(4.0, 0.6)]
    model = BilogGP(problem, history, seed=0)
    centre, low, high = model.predict(torch.tensor([[1.0], [2.0], [3.0], [4.0]]).double())
    assert centre.tolist() == pytest.approx([0.949, 0.941, 0.90, 0.6], abs=0.03)
    assert centre[:2].tolist() == pytest.approx([0.949, 0.941], abs=0.004)
    assert bool((low < centre).all() and (centre < high).all())


def test_gp_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    BilogGP(make_problem(cliff=False), [seen(2.0, 0.93)], seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_gp_joint_samples_agree_with_the_marginals() -> None:
    problem = make_problem(d=2, cliff=False)
    history = [
        Observation(torch.tensor([1.0, 1.0]), 0.945, 1e-6, 1.0),
        Observation(torch.tensor([2.5, 2.5]), 0.7, 1e-6, 2.5),
    ]
    model = BilogGP(problem, history, seed=0, samples=1024)
    pair = torch.tensor([[1.2, 1.0], [1.8, 2.0]]).double()
    joint = model.feasibility(pair).probability
    single = model.feasibility(pair.unsqueeze(-2)).probability.flatten()
    torch.testing.assert_close(joint, single, atol=0.02, rtol=0)


def test_gp_treats_divergence_as_infeasible() -> None:
    problem = make_problem(cliff=False)
    model = BilogGP(problem, [seen(1.0, 0.945), seen(3.0, None)], seed=0)
    probability = model.feasibility(torch.tensor([[[1.0]], [[3.0]]]).double()).probability
    assert probability[0] > 0.8 and probability[1] < 0.1


def test_gp_says_when_it_cannot_be_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(mll: object) -> None:
        raise ModelFittingError("no luck")

    monkeypatch.setattr(surrogates, "fit_gpytorch_mll", fail)
    with pytest.warns(RuntimeWarning, match="prior hyper-parameters are used"):
        model = BilogGP(make_problem(cliff=False), [seen(2.0, 0.93)], seed=0)
    assert model.predict(torch.tensor([[2.0]]).double())[0].isfinite().all()


def test_a_scan_moves_half_of_the_cliffs_and_no_more() -> None:
    plain, told = (
        CliffCurves.prior(20_000, 6.0, torch.Generator().manual_seed(0), one_shot)
        for one_shot in (None, 0.5)
    )
    near = [float(((c.location > 0.7) & (c.location < 3)).double().mean()) for c in (plain, told)]
    assert near[1] > near[0] + 0.15
    moved = (plain.location != told.location).double().mean()
    assert moved.item() == pytest.approx(0.5, abs=0.02)


@settings(max_examples=25, deadline=None)
@given(one_shot=st.floats(0.0, 20.0), u_max=st.floats(0.05, 8.0))
def test_whatever_a_scan_says_cliffs_stay_where_they_can_be(one_shot: float, u_max: float) -> None:
    curves = CliffCurves.prior(500, u_max, torch.Generator().manual_seed(1), one_shot)
    assert (curves.location > 0).all() and (curves.location <= 1.06 * u_max).all()


def test_a_scan_helps_where_it_is_right_and_is_outvoted_where_it_is_not() -> None:
    problem = make_problem()
    probe = torch.tensor([[2.0]]).double()

    def chance(scan: float | None, history: list[Observation]) -> float:
        told = None if scan is None else torch.tensor([scan], dtype=torch.float64)
        model = CliffEnsemble(replace(problem, scan=told), history, seed=0)
        return model.feasibility(probe).probability.item()

    assert chance(0.15, []) < chance(None, []) < chance(1.6, [])
    # Trials say that the cliff is far beyond what a scan of 0.15 would have it be.
    history = [seen(1.0, 0.95), seen(3.0, 0.949)]
    assert chance(0.15, history) > 0.95
    history = [seen(1.5, 0.85), seen(1.0, 0.945)]
    assert abs(chance(4.0, history) - chance(None, history)) < 0.05
