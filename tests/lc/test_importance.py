"""The metric in which a C-step of the default L-C ranks weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

from lightning_condensa import NeuronPrune, Prune, Scheme
from lightning_condensa.lc import LCRun, LCSchedule
from lightning_condensa.lc.importance import Importance

from .problems import Classes, Training

EVERY, WINDOW, STEPS = 6, 3, 40


class Recorded(Training):
    """Remembers the loss gradient of every step, and the weights before every C-step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gradients: list[dict[str, Tensor]] = []
        self.at_c_steps: list[dict[str, Tensor]] = []
        self.run = self.new_run()

    def backward(self) -> None:
        super().backward()
        weights = {n: p for n, p in self.weights.items() if p.grad is not None}
        self.gradients.append({n: p.grad.clone() for n, p in weights.items()})

    def new_run(self) -> LCRun:
        run, test = super().new_run(), self

        class Bound(type(run.bound)):  # type: ignore[misc]
            def pi(
                self, weights: Any, metric: Any = None, effects: Any = (), boundaries: Any = None
            ) -> Any:
                if metric is not None:
                    copies = {n: weights[n].detach().clone() for n in self.names}
                    test.at_c_steps.append(copies)
                return super().pi(weights, metric, effects, boundaries)

        run.bound = Bound(run.bound.scheme, run.bound.stages, run.bound.names)
        return run

    def mean_squares(self, before: int) -> dict[str, Tensor]:
        """E[g²] over the window before a step."""
        window = self.gradients[max(before - WINDOW, 0) : before]
        return {n: torch.stack([g[n].square() for g in window]).mean(0) for n in self.bound.names}


def recorded(scheme: Scheme, exponent: float, **options: Any) -> Recorded:
    problem = options.pop("problem", None) or Classes(torch.float64)
    schedule = LCSchedule(
        every_n_steps=EVERY, window=WINDOW, importance=exponent, shape=1.0, finetune=0.4
    )
    optimizer = optim.SGD(
        [p for p in problem.network.parameters() if p.requires_grad], lr=0.2, momentum=0.5
    )
    return Recorded(problem, scheme, schedule, optimizer, STEPS, **options)


def flat(tensors: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([t.detach().numpy().ravel() for t in tensors.values()])


def kept(theta: Any) -> np.ndarray:
    return np.concatenate([e.mask.numpy().ravel() for e in theta.values()])


@pytest.mark.parametrize("exponent", [0.0, 0.25, 1.0, 2.0])
def test_the_ranking_is_magnitude_times_root_mean_square_gradient(exponent: float) -> None:
    train = recorded(Prune(0.1), exponent)
    train.finish()
    assert len(train.at_c_steps) == len(train.c_steps) == 5
    differs = 0
    for at, progress, w, c_step in zip(
        train.plan.c_steps, train.plan.progress, train.at_c_steps, train.c_steps, strict=True
    ):
        if at == 0:
            continue
        magnitude = np.abs(flat(w))
        score = magnitude * flat(train.mean_squares(at)) ** (exponent / 2)
        k = round((1 - 0.9 * progress) * score.size)
        # Each layer keeps one weight at least, which has no part here.
        best = np.argsort(-score, kind="stable")[:k]
        found = np.flatnonzero(kept(c_step.theta))
        # Scores are compared, not places: several weights may have no gradient.
        np.testing.assert_array_equal(np.sort(score[found]), np.sort(score[best]))
        differs += set(best) != set(np.argsort(-magnitude, kind="stable")[:k])
    assert (differs > 0) == (exponent > 0)


@pytest.mark.parametrize("exponent", [0.25, 1.0])
def test_rows_are_ranked_in_the_same_metric(exponent: float) -> None:
    train = recorded(NeuronPrune(0.25, include="5"), exponent)
    train.finish()
    for at, progress, w, c_step in list(
        zip(train.plan.c_steps, train.plan.progress, train.at_c_steps, train.c_steps, strict=True)
    )[1:]:
        squares = train.mean_squares(at)["5.weight"]
        metric = (squares ** (exponent / 2)).clamp(min=1e-15)  # of dead units the largest stay
        rows = (w["5.weight"] * metric).square().sum(1)
        k = round((1 - 0.75 * progress) * 16)
        mask = c_step.theta["5.weight"].mask
        assert torch.equal(rows[mask[:, 0]].sort(descending=True).values, rows.topk(k).values)
        assert torch.equal(c_step.theta["5.bias"].mask, mask[:, 0])


def test_a_weight_that_the_loss_does_not_feel_goes_first() -> None:
    problem = Classes()
    problem.x[:, 1] = 0  # a dead input channel …
    with torch.no_grad():
        problem.network[0].weight[:, 1] = 10.0  # … with the largest weights
    dead = problem.network[0].weight[:, 1]
    train = Training(
        problem,
        Prune(0.6),
        LCSchedule(every_n_steps=10, window=4),
        optim.SGD(problem.network.parameters(), lr=0.1),
        40,
    )
    train.finish()
    assert not dead.any()
    assert problem.network[0].weight[:, 0].any()


@pytest.mark.parametrize("scheme", [Prune(0.9), NeuronPrune(0.7)])
def test_zeros_do_not_take_the_place_of_weights_without_gradients(scheme: Scheme) -> None:
    problem = Classes()
    train = Training(
        problem,
        scheme,
        LCSchedule(every_n_steps=10, window=4, shape=1.0),
        optim.SGD(problem.network.parameters(), lr=0.1),
        60,
    )
    for c_step in train.all():
        if c_step is None:
            continue
        with torch.no_grad():  # units die, most of those of the layer
            problem.network[5].bias[4:] = -100.0
        for name, encoded in c_step.theta.items():
            assert encoded.mask is None or encoded.nnz == int(encoded.mask.sum()), name


def test_without_an_exponent_a_c_step_is_the_schemes_own_projection() -> None:
    train = recorded(Prune(0.2), 0.0)
    train.finish()
    for progress, w, c_step in zip(
        train.plan.progress, train.at_c_steps, train.c_steps, strict=True
    ):
        expected = train.bound.relaxed(progress).pi(w)
        for n, encoded in expected.items():
            assert torch.equal(c_step.theta[n].decode(), encoded.decode())


def magnitude_ranked(train: Recorded, index: int) -> bool:
    expected = train.bound.relaxed(train.plan.progress[index]).pi(train.at_c_steps[index])
    theta = train.c_steps[index].theta
    return all(torch.equal(theta[n].decode(), e.decode()) for n, e in expected.items())


def test_a_frozen_parameter_counts_like_the_average_weight() -> None:
    network = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False))
    network[1].requires_grad_(False)
    parameters = dict(network.named_parameters())
    importance = Importance(1.0)
    network[0].weight.grad = torch.rand(5, 6)
    importance.observe(parameters, None)
    metric = importance.weigh(parameters)
    torch.testing.assert_close(metric["0.weight"], network[0].weight.grad)
    average = network[0].weight.grad.mean()
    torch.testing.assert_close(metric["1.weight"], average.expand(4, 5))


def test_without_any_gradient_there_is_no_metric() -> None:
    importance = Importance(1.0)
    parameters = dict(nn.Linear(2, 2).named_parameters())
    importance.observe(parameters, None)
    assert importance.weigh(parameters) == {}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("layers", [[0], [0, 2, 5, 7]])
def test_gradients_that_overflow_are_harmless(value: float, layers: list[int]) -> None:
    # In float16 a step whose gradients overflow is skipped, and the loss is scaled down.
    problem = Classes()
    overflow_at = EVERY + EVERY - 2  # in the window of the second C-step

    def spoil(step: int) -> bool:
        if step == overflow_at:
            for layer in layers:
                problem.network[layer].weight.grad.fill_(value)
        return step == overflow_at

    train = recorded(Prune(0.2), 1.0, problem=problem, spoil=spoil)
    theta = train.finish()
    # What is not known does not decide; from the next window on gradients do again.
    assert [magnitude_ranked(train, i) for i in range(1, 5)] == [False, True, False, False]
    assert all(bool(t.isfinite().all()) for t in theta.values())
    assert all(bool(p.isfinite().all()) for p in problem.network.parameters())
    layer = nn.utils.parameters_to_vector(problem.network[0].parameters())
    assert layer.count_nonzero() > 1


def test_observing_ends_when_the_support_is_settled() -> None:
    problem = Classes()
    train = Training(
        problem,
        Prune(0.2),
        LCSchedule(every_n_steps=5),
        optim.SGD(problem.network.parameters(), lr=0.1),
        STEPS,
    )
    train.finish()
    assert train.run.finetuning
    assert not train.run.state_dict()["engine"]["importance"]
