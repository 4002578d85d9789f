from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_condensa.lc import LCSchedule, PaperSchedule, Plan, Schedule, make_schedule

rates = st.floats(1e-6, 1)
shares = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


@st.composite
def schedules(draw: st.DrawFn) -> LCSchedule:
    every = draw(st.sampled_from([{}, {"every_n_steps"}, {"every_n_epochs"}]))
    return LCSchedule(
        l_steps=draw(st.integers(1, 200)),
        **{name: draw(st.integers(1, 400)) for name in every},
        rate_start=draw(rates),
        rate_end=draw(rates),
        prune_rate=draw(rates),
        ramp=draw(shares),
        shape=draw(st.floats(1, 9)),
        finetune=draw(shares),
        importance=draw(st.floats(0, 2)),
        window=draw(st.integers(1, 20)),
    )


totals = st.one_of(st.integers(1, 10), st.integers(1, 3000))


@given(
    schedule=schedules(),
    total=totals,
    prunes=st.booleans(),
    projects=st.booleans(),
    rounds=st.booleans(),
    steps_per_epoch=st.integers(1, 500),
)
def test_every_plan_is_one_that_can_be_run(
    schedule: LCSchedule,
    total: int,
    prunes: bool,
    projects: bool,
    rounds: bool,
    steps_per_epoch: int,
) -> None:
    plan = schedule.plan(
        total,
        prunes=prunes,
        projects=projects,
        rounds=projects and rounds,
        steps_per_epoch=steps_per_epoch,
    )
    assert plan.c_steps[0] == 0
    assert all(a < b for a, b in pairwise(plan.c_steps))
    assert plan.c_steps[-1] <= total
    assert len(plan.progress) == len(plan.c_steps)
    assert len(plan.strength) == len(plan.rounding) == len(plan.c_steps)
    assert plan.strength[0] == 0
    assert all(0 < rate <= 1 for rate in (*plan.strength[1:], *plan.rounding))
    # The L-C phase ends with a C-step, at the scheme's own density, and not before.
    assert plan.l_end in plan.c_steps
    assert all(0 <= a <= b <= 1 for a, b in pairwise((*plan.progress, 1.0)))
    assert plan.progress[plan.c_steps.index(plan.l_end)] == 1
    if prunes:
        assert plan.finetune_from == plan.l_end
        assert abs(plan.l_end - total * (1 - schedule.finetune)) <= 0.5
    else:
        assert plan.finetune_from is None
        assert plan.l_end == total
    # Afterwards there is something to do only where values are projected.
    after = [c for c in plan.c_steps if c > plan.l_end]
    assert bool(after) == (projects and plan.l_end < total)
    if after:
        assert after[-1] == total


@given(total=totals, l_steps=st.integers(1, 200), finetune=shares)
def test_l_steps_are_evenly_spread(total: int, l_steps: int, finetune: float) -> None:
    plan = LCSchedule(l_steps=l_steps, finetune=finetune).plan(total)
    lengths = [b - a for a, b in pairwise(plan.c_steps)]
    assert len(lengths) == min(l_steps, plan.l_end)
    if lengths:
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("total", [1, 59, 60, 61, 480, 481, 3000])
def test_a_scheme_that_only_rounds_has_no_long_l_step(total: int) -> None:
    plan = LCSchedule().plan(total, prunes=False, projects=True, rounds=True)
    lengths = [b - a for a, b in pairwise(plan.c_steps)]
    assert len(lengths) >= min(60, total)
    assert max(lengths) == (1 if total <= 60 else min(8, math.ceil(total / 60)))


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {"prunes": False, "projects": True}),  # singular values are dear
        ({}, {"prunes": True, "projects": True, "rounds": True}),
        ({"l_steps": 60}, {"prunes": False, "projects": True, "rounds": True}),
    ],
)
def test_others_have_sixty_l_steps(fields: dict[str, Any], options: dict[str, bool]) -> None:
    plan = LCSchedule(**fields).plan(3000, **options)
    assert plan.c_steps.index(plan.l_end) == 60


@given(total=totals, every=st.integers(1, 400), finetune=shares, projects=st.booleans())
def test_c_steps_every_n_steps(total: int, every: int, finetune: float, projects: bool) -> None:
    schedule = LCSchedule(every_n_steps=every, finetune=finetune)
    plan = schedule.plan(total, projects=projects)
    ends = {plan.l_end, plan.c_steps[-1]}  # a phase's last L-step takes what is left
    for before, after in pairwise(plan.c_steps):
        assert after - before == every or (after in ends and after - before < every)


def test_c_steps_every_n_epochs() -> None:
    schedule = LCSchedule(every_n_epochs=2, finetune=0.5)
    assert schedule.plan(100, steps_per_epoch=10).c_steps == (0, 20, 40, 50)
    assert schedule.plan(100, steps_per_epoch=10, projects=True).c_steps == (
        *(0, 20, 40, 50),
        *(70, 90, 100),
    )
    with pytest.raises(ValueError, match="every_n_epochs needs epochs of a known length"):
        schedule.plan(100)


@pytest.mark.parametrize(
    ("fields", "total", "options", "c_steps", "progress"),
    [
        # fine-tuning: none, or nothing else
        ({"l_steps": 2, "finetune": 0.0}, 10, {}, (0, 5, 10), (0, 0.5, 1)),
        ({"l_steps": 2, "finetune": 1.0}, 10, {}, (0,), (1,)),
        # tiny runs
        ({}, 1, {}, (0, 1), (0, 1)),
        ({}, 2, {}, (0, 1), (0, 1)),
        ({}, 4, {}, (0, 1, 2, 3), (0, 1 / 3, 2 / 3, 1)),
        # without a ramp the first C-step prunes all there is to prune
        ({"l_steps": 2, "ramp": 0.0, "finetune": 0.0}, 10, {}, (0, 5, 10), (1, 1, 1)),
        ({"l_steps": 4, "ramp": 0.5, "finetune": 0.0}, 8, {}, (0, 2, 4, 6, 8), (0, 0.5, 1, 1, 1)),
        # rounding goes on while the support stays
        ({"l_steps": 2, "finetune": 0.5}, 20, {"projects": True}, (0, 5, 10, 15, 20), None),
        ({"l_steps": 5, "finetune": 1.0}, 20, {"projects": True}, (0, 4, 8, 12, 16, 20), (1,) * 6),
        # nothing to prune: no fine-tuning
        ({"l_steps": 2}, 10, {"prunes": False, "projects": True}, (0, 5, 10), None),
    ],
)
def test_plans_known_by_heart(
    fields: dict[str, Any],
    total: int,
    options: dict[str, bool],
    c_steps: tuple[int, ...],
    progress: tuple[float, ...] | None,
) -> None:
    plan = LCSchedule(shape=1.0, **fields).plan(total, **options)
    assert plan.c_steps == c_steps
    if progress is not None:
        assert plan.progress == pytest.approx(progress)


@given(start=rates, end=rates, total=st.integers(1, 300), projects=st.booleans())
def test_the_rate_grows_linearly(start: float, end: float, total: int, projects: bool) -> None:
    plan = LCSchedule(rate_start=start, rate_end=end).plan(total, projects=projects)
    for rates, first in ((plan.rounding, start), (plan.strength, 0)):
        of_l_steps = rates[:-1]  # the last C-step has no L-step after it
        if of_l_steps:
            assert of_l_steps[0] == pytest.approx(first)
        if len(of_l_steps) > 1:
            assert of_l_steps[-1] == pytest.approx(end)
            growth = of_l_steps[1] - of_l_steps[0]
            assert all(b - a == pytest.approx(growth, abs=1e-9) for a, b in pairwise(of_l_steps))


@pytest.mark.parametrize(
    ("fields", "prunes", "first"),
    [
        ({}, False, 0.5),
        ({}, True, 0.0),
        ({"rate_end": 0.25}, False, 0.25),
        ({"rate_start": 0.0}, False, 0.0),
        ({"rate_start": 1.0}, True, 1.0),
    ],
)
def test_rounding_begins_half_way_unless_weights_are_pruned_too(
    fields: dict[str, Any], prunes: bool, first: float
) -> None:
    plan = LCSchedule(**fields).plan(100, prunes=prunes, projects=True)
    assert plan.rounding[0] == first
    assert plan.rounding[-1] == fields.get("rate_end", 1.0)


def test_the_default_is_proximal_and_leaves_the_learning_rate_alone() -> None:
    plan = LCSchedule(prune_rate=0.3, importance=0.5, window=3, reset_optimizer=True).plan(100)
    assert plan.proximal
    assert plan.learning_rate is None
    assert (plan.prune_rate, plan.importance, plan.window) == (0.3, 0.5, 3)
    assert plan.reset_optimizer
    assert LCSchedule().plan(100, prunes=False, projects=True).importance == 0  # nothing to rank


def test_the_end_of_the_l_c_phase() -> None:
    plan = Plan((0, 5), (0.0, 1.0), (0.1, 0.1), proximal=True, finetune_from=5)
    assert plan.l_end == 5
    endless = Plan((0, 5, 9), (1.0,) * 3, (0.1,) * 3, proximal=False, finetune_from=None)
    assert endless.l_end == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l_steps": 0}, "l_steps must be an int >= 1, got 0"),
        ({"l_steps": 2.5}, "l_steps must be an int"),
        ({"l_steps": True}, "l_steps must be an int"),
        ({"window": 0}, "window must be an int >= 1, got 0"),
        ({"rate_start": -0.1}, r"rate_start must be a number in \[0, 1\], got -0.1"),
        ({"rate_start": "fast"}, "rate_start"),
        ({"rate_end": 1.01}, "rate_end"),
        ({"rate_end": math.nan}, "rate_end"),
        ({"rate_end": math.inf}, "rate_end"),
        ({"prune_rate": 0}, "prune_rate"),
        ({"prune_rate": 1.5}, "prune_rate"),
        ({"ramp": 1.1}, r"ramp must be a number in \[0, 1\], got 1.1"),
        ({"finetune": "half"}, "finetune"),
        ({"finetune": -0.1}, "finetune"),
        ({"importance": 2.1}, r"importance must be a number in \[0, 2\]"),
        ({"importance": -1}, "importance"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"every_n_epochs": 1.5}, "every_n_epochs"),
        ({"every_n_epochs": 1, "every_n_steps": 2}, "not both, got 2 and 1"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LCSchedule(**arguments)


def test_presets() -> None:
    assert make_schedule("default", None) == LCSchedule()
    assert make_schedule("default", {"l_steps": 7}) == LCSchedule(l_steps=7)
    assert make_schedule("paper", {"steps": 3}) == PaperSchedule(steps=3)
    own: Schedule = PaperSchedule(steps=4)
    assert make_schedule("default", own) is own
    with pytest.raises(ValueError, match=r"preset must be one of.*'fast'"):
        make_schedule("fast", None)
    with pytest.raises(ValueError, match=r"'default' has no \['steps'\]; it has .*'l_steps'"):
        make_schedule("default", {"steps": 3})
