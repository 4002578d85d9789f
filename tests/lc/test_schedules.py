from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_condensa.lc import LCSchedule, PaperSchedule, Plan, Schedule, make_schedule


@given(
    total=st.integers(1, 3000),
    l_steps=st.integers(1, 200),
    ramp=st.floats(0, 1),
    finetune=st.floats(0, 1),
    start=st.floats(1e-4, 1.0),
    end=st.floats(0.1, 10.0),
)
def test_default_plan(
    total: int, l_steps: int, ramp: float, finetune: float, start: float, end: float
) -> None:
    schedule = LCSchedule(
        l_steps=l_steps, ramp=ramp, finetune=finetune, rate_start=start, rate_end=end
    )
    plan = schedule.plan(total)
    assert plan.c_steps[0] == 0
    assert plan.c_steps[-1] == plan.finetune_from
    assert 0 <= plan.finetune_from <= total
    assert abs(plan.finetune_from - total * (1 - finetune)) <= 0.5
    n = len(plan.c_steps) - 1
    assert n == min(l_steps, max(plan.finetune_from, 1))
    assert len(plan.progress) == len(plan.mu) == n + 1
    lengths = [b - a for a, b in pairwise(plan.c_steps)]
    if plan.finetune_from:  # every L-step has a step, and all have about as many
        assert min(lengths) >= 1
        assert max(lengths) - min(lengths) <= 1
    # progress rises to 1, which it reaches at `ramp`
    assert all(0 <= a <= b <= 1 for a, b in pairwise(plan.progress))
    assert plan.progress[-1] == 1
    for i, p in enumerate(plan.progress):
        if i >= ramp * n:
            assert p == 1
    # μ is geometric
    assert plan.mu[0] == pytest.approx(start)
    if n > 1:
        assert plan.mu[n - 1] == pytest.approx(end)
    ratios = [b / a for a, b in pairwise(plan.mu)]
    assert all(r == pytest.approx(ratios[0]) for r in ratios)
    assert not plan.absolute_mu
    assert plan.learning_rate is None


@given(
    total=st.integers(1, 3000),
    every=st.integers(1, 400),
    finetune=st.floats(0, 1),
    prunes=st.booleans(),
)
def test_c_steps_every_n_steps(total: int, every: int, finetune: float, prunes: bool) -> None:
    plan = LCSchedule(every_n_steps=every, finetune=finetune).plan(total, prunes)
    assert plan.finetune_from == (round(total * (1 - finetune)) if prunes else total)
    assert plan.c_steps[0] == 0
    assert plan.c_steps[-1] == plan.finetune_from
    lengths = [b - a for a, b in pairwise(plan.c_steps)]
    assert all(n == every for n in lengths[:-1])
    assert lengths[-1] <= every
    if plan.finetune_from:
        assert lengths[-1] > 0
    assert len(plan.progress) == len(plan.mu) == len(plan.c_steps)
    assert plan.progress[-1] == 1


def test_c_steps_every_n_epochs() -> None:
    schedule = LCSchedule(every_n_epochs=2, finetune=0.5)
    assert schedule.plan(100, steps_per_epoch=10).c_steps == (0, 20, 40, 50)
    with pytest.raises(ValueError, match="every_n_epochs needs epochs of a known length"):
        schedule.plan(100)


def test_ramp_is_cubic() -> None:
    plan = LCSchedule(l_steps=10, ramp=0.5).plan(1000)
    assert plan.progress[:6] == pytest.approx([1 - (1 - i / 5) ** 3 for i in range(6)])
    assert LCSchedule(l_steps=4, ramp=0).plan(100).progress == (1.0,) * 5


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
    assert plan.absolute_mu and plan.reset_optimizer
    assert plan.dual_step == (1.0,) * len(plan.c_steps)
    assert plan.finetune_from == len(lrs)
    assert plan.learning_rate is not None
    assert [plan.learning_rate(i) for i in range(len(lrs))] == pytest.approx(lrs)
    of_step = [mu_of(plan, i) for i in range(len(lrs))]
    assert of_step == pytest.approx(mus)


def mu_of(plan: Plan, step: int) -> float:
    return plan.mu[max(i for i, c in enumerate(plan.c_steps) if c <= step)]


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
    ("cls", "arguments", "message"),
    [
        (LCSchedule, {"l_steps": 0}, "l_steps"),
        (LCSchedule, {"l_steps": 2.5}, "l_steps"),
        (LCSchedule, {"l_steps": True}, "l_steps"),
        (LCSchedule, {"rate_start": 0}, "rate_start"),
        (LCSchedule, {"rate_end": -1}, "rate_end"),
        (LCSchedule, {"rate_end": math.nan}, "rate_end"),
        (LCSchedule, {"rate_end": math.inf}, "rate_end"),
        (LCSchedule, {"ramp": 1.1}, "ramp"),
        (LCSchedule, {"finetune": "half"}, "finetune"),
        (LCSchedule, {"every_n_steps": 0}, "every_n_steps"),
        (LCSchedule, {"every_n_epochs": 1.5}, "every_n_epochs"),
        (LCSchedule, {"every_n_epochs": 1, "every_n_steps": 1}, "not both"),
        (PaperSchedule, {"steps": 1}, "steps"),
        (PaperSchedule, {"mb_iterations_per_l": 0}, "mb_iterations_per_l"),
        (PaperSchedule, {"mu_init": 0}, "mu_init"),
        (PaperSchedule, {"mu_multiplier": 0.5}, "mu_multiplier"),
        (PaperSchedule, {"lr": 0}, "lr"),
        (PaperSchedule, {"lr": 0.1, "lr_end": 0.0}, "lr_end"),
        (PaperSchedule, {"lr": 0.1, "lr_decay": -0.5}, "lr_decay"),
        (PaperSchedule, {"lr_end": 0.1}, "need lr"),
        (PaperSchedule, {"lr": 0.1, "lr_schedule": [1]}, "go together"),
        (PaperSchedule, {"lr": 0.1, "lr_multiplier": 0.1}, "go together"),
    ],
)
def test_values_out_of_range_are_refused(
    cls: type[Schedule], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def test_presets() -> None:
    assert make_schedule("default", None) == LCSchedule()
    assert make_schedule("default", {"l_steps": 7}) == LCSchedule(l_steps=7)
    assert make_schedule("paper", {"steps": 3}) == PaperSchedule(steps=3)
    own = PaperSchedule(steps=4)
    assert make_schedule("default", own) is own
    with pytest.raises(ValueError, match=r"preset must be one of.*'fast'"):
        make_schedule("fast", None)
    with pytest.raises(ValueError, match=r"'default' has no \['steps'\]; it has .*'l_steps'"):
        make_schedule("default", {"steps": 3})


def test_the_dual_step_is_what_an_l_step_can_close() -> None:
    plan = LCSchedule(every_n_steps=10, rate_start=0.05, rate_end=0.05, finetune=0.0).plan(100)
    assert plan.dual_step == pytest.approx((0.0, *[1 - 0.95**10] * 10))
    assert not any(LCSchedule(multipliers=False).plan(100).dual_step)
    long = LCSchedule(l_steps=2, rate_start=0.5, rate_end=2.0).plan(1000)
    assert long.dual_step == pytest.approx((0.0, 1.0, 1.0))
