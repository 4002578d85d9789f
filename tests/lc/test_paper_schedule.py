from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_condensa.lc import PaperSchedule, Plan


def published(
    *,
    steps: int,
    per_l: int,
    first_l: int,
    lr: float,
    lr_end: float | None,
    lr_decay: float | None,
    lr_schedule: list[int] | None,
    lr_multiplier: float | None,
    mu_init: float,
    mu_multiplier: float,
    mu_cap: float,
) -> tuple[list[float], list[float], list[int]]:
    """lr and μ of every mini-batch, and the mini-batches before every C-step, as published.

    The first iteration has no L-step and μ = 0. After an iteration, μ becomes ``mu_init`` or
    grows unless it has passed the cap, and the outer learning rate is decayed; inside an L-step
    the learning rate falls geometrically.
    """
    mu, outer = 0.0, lr
    lrs: list[float] = []
    mus: list[float] = []
    c_steps: list[int] = []
    for iteration in range(steps):
        current = outer
        batches = (0, first_l)[iteration] if iteration < 2 else per_l
        for _ in range(batches):
            lrs.append(current)
            mus.append(mu)
            if lr_end is not None:
                current *= math.exp((math.log(lr_end) - math.log(outer)) / batches)
        c_steps.append(len(lrs))
        if mu == 0:
            mu = mu_init
        elif mu <= mu_cap:
            mu *= mu_multiplier
        if lr_decay is not None:
            outer = lr * lr_decay ** (iteration + 1)
        elif lr_schedule is not None and iteration in lr_schedule:
            assert lr_multiplier is not None
            outer *= lr_multiplier
    return lrs, mus, c_steps


@pytest.mark.parametrize(
    "rates",
    [
        {"lr_end": None, "lr_decay": None, "lr_schedule": None, "lr_multiplier": None},
        {"lr_end": 1e-3, "lr_decay": None, "lr_schedule": None, "lr_multiplier": None},
        {"lr_end": 1e-3, "lr_decay": 0.9, "lr_schedule": None, "lr_multiplier": None},
        {"lr_end": None, "lr_decay": None, "lr_schedule": [0, 2, 3], "lr_multiplier": 0.5},
        {"lr_end": 1e-4, "lr_decay": None, "lr_schedule": [1, 4], "lr_multiplier": 0.1},
    ],
)
@pytest.mark.parametrize(
    ("steps", "first_l", "per_l", "mu_cap"),
    [(7, 9, 4, 1e4), (2, 5, 3, 1e4), (6, 3, 3, 0.02), (3, 1, 1, 1e-9)],
)
def test_paper_schedule_is_the_published_one(
    rates: dict[str, Any], steps: int, first_l: int, per_l: int, mu_cap: float
) -> None:
    lr, mu_init, growth = 0.1, 0.01, 1.7
    lrs, mus, c_steps = published(
        steps=steps,
        per_l=per_l,
        first_l=first_l,
        lr=lr,
        mu_init=mu_init,
        mu_multiplier=growth,
        mu_cap=mu_cap,
        **rates,
    )
    schedule = PaperSchedule(
        steps=steps,
        mb_iterations_per_l=per_l,
        mb_iterations_first_l=first_l,
        lr=lr,
        mu_init=mu_init,
        mu_multiplier=growth,
        mu_cap=mu_cap,
        **rates,
    )
    plan = schedule.plan(len(lrs))
    assert list(plan.c_steps) == c_steps
    assert set(plan.progress) == {1.0}
    assert plan.reset_optimizer
    assert not plan.proximal
    assert plan.finetune_from is None
    assert plan.l_end == len(lrs)
    assert plan.learning_rate is not None
    assert [plan.learning_rate(i) for i in range(len(lrs))] == pytest.approx(lrs)
    of_step = [mu_of(plan, i) for i in range(len(lrs))]
    assert of_step == pytest.approx(mus)


def mu_of(plan: Plan, step: int) -> float:
    return plan.strength[max(i for i, c in enumerate(plan.c_steps) if c <= step)]


def test_paper_schedule_fills_the_trainers_steps() -> None:
    plan = PaperSchedule(steps=5).plan(103)
    assert plan.c_steps == (0, 25, 50, 75, 103)
    plan = PaperSchedule(steps=5, mb_iterations_first_l=40).plan(103)
    assert plan.c_steps == (0, 40, 55, 70, 103) or plan.c_steps[:2] == (0, 40)
    assert plan.c_steps[-1] == 103


def test_the_last_l_step_goes_on_at_its_end_rate() -> None:
    schedule = PaperSchedule(steps=3, mb_iterations_per_l=10, lr=0.1, lr_end=0.01)
    plan = schedule.plan(40)
    assert plan.c_steps == (0, 10, 20)
    assert plan.learning_rate is not None
    assert plan.learning_rate(19) > 0.01
    assert [plan.learning_rate(i) for i in (20, 30, 39)] == pytest.approx([0.01] * 3)


def test_paper_schedule_that_does_not_fit() -> None:
    schedule = PaperSchedule(steps=4, mb_iterations_per_l=10, mb_iterations_first_l=30)
    assert schedule.plan(50).c_steps == (0, 30, 40, 50)
    with pytest.raises(ValueError, match=r"needs 50 optimizer steps.*Trainer runs 49"):
        schedule.plan(49)
    with pytest.raises(ValueError, match="Trainer runs 10"):
        PaperSchedule(steps=30).plan(10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, "steps must be an int >= 2, got 1"),
        ({"mb_iterations_per_l": 0}, "mb_iterations_per_l"),
        ({"mb_iterations_first_l": 1.5}, "mb_iterations_first_l"),
        ({"mu_init": 0}, "mu_init"),
        ({"mu_multiplier": 0.5}, "mu_multiplier"),
        ({"lr": 0}, "lr"),
        ({"lr": 0.1, "lr_end": 0.0}, "lr_end"),
        ({"lr": 0.1, "lr_decay": -0.5}, "lr_decay"),
        ({"lr_end": 0.1}, "need lr"),
        ({"lr": 0.1, "lr_schedule": [1]}, "go together"),
        ({"lr": 0.1, "lr_multiplier": 0.1}, "go together"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PaperSchedule(**arguments)
