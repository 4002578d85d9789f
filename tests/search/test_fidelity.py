"""Trials that take a share of the training, and what they tell of all of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Toy, loaders, search

from lightning_condensa import Choice, Compose, Prune, Quantize, Range
from lightning_condensa.search import CondensaSearch, ProcessPool, SearchResult
from lightning_condensa.search.acquisition import KnownObjectiveCEI
from lightning_condensa.search.cliff import CliffShift
from lightning_condensa.search.fidelity import share_of_training
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.strategies import make_strategy
from lightning_condensa.search.strategies.foresight import Foresight
from lightning_condensa.search.surrogates import CliffEnsemble
from lightning_condensa.search.synthetic import SyntheticCliff

EPOCHS, BATCHES = 8, 4

# -- surrogate -----------------------------------------------------------------------------------

U = torch.linspace(0.05, 5.0, 60, dtype=torch.float64).unsqueeze(-1)
DENSE = Observation(torch.zeros(1), metric=0.95, variance=1e-6, utility=0.0)
PROBLEM = Problem(U, U[:, 0], DENSE, 0.94, 1e-6, cliff=True).with_share(0.25)


def seen(u: float, share: float, metric: float | None) -> Observation:
    point = torch.tensor([u, share], dtype=torch.float64)
    return Observation(point, metric, 1e-6, u, diverged=metric is None)


@given(moved=st.floats(0, 3), rate=st.floats(0.1, 1), a=st.floats(0.01, 1), b=st.floats(0.01, 1))
def test_more_training_leaves_the_cliff_farther(
    moved: float, rate: float, a: float, b: float
) -> None:
    shift = CliffShift(torch.tensor([moved]).double(), torch.tensor([rate]).double())
    less, more, full = shift.stretch(torch.tensor([min(a, b), max(a, b), 1.0]).double())[0].tolist()
    assert full == 1.0 <= more <= less <= math.exp(moved) + 1e-9


@settings(max_examples=20, deadline=None)
@given(u=st.floats(0.3, 4.8))
def test_failing_after_less_training_says_less(u: float) -> None:
    full = torch.cat([U, torch.ones_like(U)], dim=-1)
    before, cheap, whole = (
        # All the draws, so that the ensembles differ in nothing but their weights.
        CliffEnsemble(PROBLEM, told, 0, 2000, 2000).feasibility(full).probability
        for told in ([], [seen(u, 0.25, None)], [seen(u, 1.0, None)])
    )
    at = int((U[:, 0] - u).abs().argmin())
    assert whole[at] - 1e-3 <= cheap[at] <= before[at] + 1e-3


def test_what_is_lost_after_less_training_is_no_measurement_of_all_of_it() -> None:
    full = torch.tensor([[2.0, 1.0], [1.5, 1.0]]).double()
    before, cheap, whole = (
        CliffEnsemble(PROBLEM, told, 0).feasibility(full).probability
        for told in ([], [seen(2.0, 0.25, 0.85)], [seen(2.0, 1.0, 0.85)])
    )
    assert whole[0] < 0.01 < 0.15 < cheap[0] < before[0]
    assert whole[1] < cheap[1]


def test_keeping_the_level_after_less_training_says_more() -> None:
    full = torch.tensor([[3.2, 1.0]]).double()
    cheap, whole = (
        CliffEnsemble(PROBLEM, [seen(3.0, share, 0.949)], 0).feasibility(full).probability
        for share in (0.25, 1.0)
    )
    assert cheap > whole and cheap > 0.9


def test_the_shift_is_learned() -> None:
    probe = torch.tensor([[2.2, 1.0]]).double()
    far = [seen(1.0, 0.25, 0.6), seen(2.0, 1.0, 0.949)]
    near = [seen(2.0, 1.0, 0.92), seen(1.9, 0.25, 0.92)]
    shifts = [
        float(
            (m.shift.stretch(torch.tensor([0.25]).double())[:, 0].log() * m.ensemble_weights).sum()
        )
        for m in (CliffEnsemble(PROBLEM, told, 0) for told in ([], far, near))
        if m.shift is not None
    ]
    assert shifts[2] < shifts[0] < shifts[1]
    assert shifts[2] < 0.2 and shifts[1] > math.log(2)
    # Without a share a point is of all the training.
    model = CliffEnsemble(PROBLEM, far, 0)
    torch.testing.assert_close(model.predict(probe)[0], model.predict(probe[:, :1])[0])


def test_a_problem_with_shares_has_a_cliff_and_a_level() -> None:
    assert PROBLEM.candidates.shape == (120, 2) and PROBLEM.baseline.point.tolist() == [0.0, 1.0]
    assert torch.equal(PROBLEM.cost, PROBLEM.candidates[:, 1])
    plain = Problem(U, U[:, 0], DENSE, 0.94, 1e-6, cliff=True)
    assert torch.equal(plain.cost, torch.ones(60).double())
    with pytest.raises(ValueError, match="fidelity needs cliff=True"):
        replace(plain, cliff=False).with_share(0.5)
    with pytest.raises(ValueError, match=r"shares in \(0, 1\]"):
        plain.with_share(1.5)


# -- strategy ------------------------------------------------------------------------------------


def shares_of(case: SyntheticCliff, trainings: float) -> list[tuple[float, bool]]:
    """The share of each trial, and whether it was feasible."""
    problem, history, left = case.problem(), list[Observation](), trainings
    while left >= 1:
        offered = problem.affordable(left)
        (index,) = make_strategy("condensa").propose(offered, history, None, 1, seed=len(history))
        history.append(case.observe(int(problem.nearest(offered.candidates[index][None]))))
        left -= float(history[-1].point[1])
    return [(float(s.point[1]), s.feasible(problem.level)) for s in history]


def test_cheap_trials_go_first_and_full_ones_last() -> None:
    early, late = [], []
    for seed in range(4):
        found = shares_of(SyntheticCliff.draw(seed, "memory", share=0.25), 6)
        early.append(found[0][0])
        late += [share for share, _ in found[-3:]]
        assert found[-1][0] == 1 and any(kept for share, kept in found if share == 1)
    assert early == [0.25] * 4
    assert late.count(1.0) >= 11


def test_a_cheap_trial_needs_a_full_one_after_it() -> None:
    assert PROBLEM.affordable(1.25).candidates.shape == (120, 2)
    assert set(PROBLEM.affordable(1.24).cost.tolist()) == {1.0}
    with pytest.raises(ValueError, match="candidate"):
        PROBLEM.affordable(0.5)


def test_what_cheap_trials_show_is_no_improvement() -> None:
    """A point that kept the level after a quarter is still to be had with all of the training."""
    history = [seen(3.0, 0.25, 0.949), seen(3.5, 0.25, 0.949), seen(4.0, 0.25, 0.6)]
    full = PROBLEM.affordable(1)
    (index,) = make_strategy("condensa").propose(full, history, None, 1, seed=0)
    assert full.candidates[index, 0] > 3
    # What counts as feasible with a margin rests on full trials alone, too.
    sure = replace(PROBLEM, z=1.64)
    assert make_strategy("condensa").propose(sure.affordable(1), history, None, 1, seed=0)


def test_foresight_counts_what_the_next_full_trial_gains() -> None:
    """Against a simulation: draw the member, the outcome, and choose again with its weights."""
    model = CliffEnsemble(PROBLEM, [seen(1.0, 1.0, 0.949)], 0, 500, 100)
    full = PROBLEM.affordable(1)
    judged = KnownObjectiveCEI(model, PROBLEM.utility_at, 1.0)
    foresight = Foresight(PROBLEM, model, judged, full.candidates)
    point = torch.tensor([[2.5, 0.25]]).double()
    told = float(foresight.after(point))
    mean, sd, log_weights = model.outlook(point)
    sd = (sd**2 + PROBLEM.noise_variance).sqrt()
    margin = model.feasibility(full.candidates.unsqueeze(0)).margin[0]
    gain = (full.utility - 1).clamp(min=0) * torch.special.ndtr(margin)  # S x j
    generator = torch.Generator().manual_seed(0)
    members = torch.multinomial(log_weights.exp(), 1500, True, generator=generator)
    shown = mean[members, 0] + sd[members, 0] * torch.randn(1500, generator=generator).double()
    likely = -0.5 * ((shown - mean) / sd) ** 2 - sd.log() + log_weights[:, None]  # S x draws
    gains = (likely.softmax(dim=0).T @ gain).amax(dim=1)
    exact = float(gains.mean() - (log_weights.exp() @ gain).max())
    # Outcomes within an interval are not told apart: a little less, and never nothing.
    assert 0.6 * exact < told < 1.1 * exact


def test_foresight_after_a_full_trial() -> None:
    model = CliffEnsemble(PROBLEM, [], 0, 500, 100)
    full = PROBLEM.affordable(1)
    judged = KnownObjectiveCEI(model, PROBLEM.utility_at, 0.0)
    foresight = Foresight(PROBLEM, model, judged, full.candidates)
    # One that nobody doubts says nothing, and its gain is no longer there for the next.
    first = full.candidates[:1]
    now = float(judged(full.candidates.unsqueeze(-2)).exp().max())
    assert 0.9 * (now - float(full.utility[0])) < foresight.after_full(first) < now
    # One in the middle of all cliffs tells something.
    middle = full.candidates[30:31]
    better = float(full.utility[30])
    beyond = KnownObjectiveCEI(model, PROBLEM.utility_at, better)
    blind = float(beyond(full.candidates.unsqueeze(-2)).exp().max())
    assert foresight.after_full(middle) > blind


def test_one_cheap_trial_at_a_time() -> None:
    strategy = make_strategy("condensa")
    (alone,) = strategy.propose(PROBLEM, [], None, q=1, seed=0)
    assert PROBLEM.cost[alone] == 0.25
    pending = PROBLEM.candidates[alone][None]
    beside = strategy.propose(PROBLEM, [], pending, q=3, seed=0)
    assert PROBLEM.cost[beside].tolist() == [1.0] * 3
    assert strategy.propose(PROBLEM, [], None, q=4, seed=0) == [alone, *beside]
    full = PROBLEM.candidates[beside[:2]]
    assert strategy.propose(PROBLEM, [], full, q=2, seed=0)  # beside what competes
    few = PROBLEM.only(PROBLEM.candidates[:, 0] < 0.4)
    every = strategy.propose(few, [], few.candidates[-1:], q=50, seed=0)
    assert len(every) == len(set(every)) == int((few.cost == 1).sum())


# -- whole searches ------------------------------------------------------------------------------


class Slow(Toy):
    """Less than all of the training leaves its cliff at density 0.15."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("trained", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trained += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        cliff = 0.05 if self.trained >= EPOCHS * BATCHES else 0.15
        drop = 0.5 * min(max(math.log(cliff / self._density()), 0.0), 1.0)
        self.log_dict({"val_acc": 0.95 - drop, "val_loss": 0.1 + drop})


def slow() -> Slow:
    torch.manual_seed(0)
    return Slow()


def frugal(directory: Path, **changes: Any) -> CondensaSearch:
    settings = {"max_epochs": EPOCHS, "accelerator": "cpu"}
    arguments = {"trainer": settings, "fidelity": 0.25, "warm_start": 0, "max_trials": 5}
    return search(directory, **{**arguments, **changes})


def check_shares(result: SearchResult, budget: float, share: float = 0.25) -> None:
    """Each trial took the steps that it was given, and all of them the budget."""
    assert all(t.state != "failed" for t in result.trials)
    assert {t.fidelity for t in result.trials} == {share, 1.0}
    searched = [t for t in result.trials if t.confirms is None]
    spent = sum(t.fidelity for t in searched)
    assert budget - 1 < spent <= budget
    for trial in result.trials:
        if trial.parent is None and trial.state != "aborted":
            assert trial.steps == trial.fidelity * EPOCHS * BATCHES


def test_cheap_trials_find_where_the_full_ones_have_to_look(tmp_path: Path) -> None:
    result = frugal(tmp_path, confirm=1).fit(slow(), **loaders())
    check_shares(result, 5)
    assert result.trials[0].fidelity == 0.25
    short = [t for t in result.trials if t.fidelity < 1]
    best = result.best
    assert best is not None and best.fidelity == 1 and best.values["density"] < 0.07
    # What failed after a quarter, whose cliff is at 0.15, did not keep the search from there.
    assert any(t.state == "infeasible" and t.values["density"] < 0.15 for t in short)
    assert best.load(slow()).trained == EPOCHS * BATCHES
    (again,) = [t for t in result.trials if t.confirms is not None]
    assert (again.fidelity, again.steps) == (1, EPOCHS * BATCHES)
    assert "infeasible after 25% of the training" in result.to_html()
    result.plot()


@pytest.mark.slow
def test_only_full_trials_win_and_certify(tmp_path: Path) -> None:
    result = frugal(tmp_path, confidence=0.9).fit(slow(), **loaders())
    short = [t for t in result.trials if t.fidelity < 1]
    assert short and all(t.probability is None for t in short)
    # Even where nothing else is left.
    alone = replace(result, trials=tuple(replace(t, state="feasible") for t in short))
    assert alone.best is None and alone.pareto == [] and alone.nearest_miss is None
    assert "No trial is feasible" in alone.summary()
    # And the probabilities are those of a search that never saw the cheap ones.
    full = [t for t in result.trials if t.fidelity == 1]
    store = optuna.load_study(study_name="condensa", storage=f"sqlite:///{tmp_path}/study.db")
    assert store.best_trial.number == result.best.number
    plain = optuna.create_study(
        study_name="condensa", storage=f"sqlite:///{tmp_path}/full.db", direction=store.direction
    )
    for key, value in store.user_attrs.items():
        plain.set_user_attr(key, value)
    for trial in store.trials:
        if "fidelity" not in trial.user_attrs:
            plain.add_trial(trial)
    told = frugal(
        tmp_path,
        confidence=0.9,
        fidelity=1.0,
        max_trials=1,
        storage=f"sqlite:///{tmp_path}/full.db",
    ).fit(slow(), **loaders())
    for ours, theirs in zip(full, told.trials, strict=True):
        assert ours.probability == pytest.approx(theirs.probability, abs=0.05)


def attributes(directory: Path) -> list[float | None]:
    storage = f"sqlite:///{directory}/study.db"
    study = optuna.load_study(study_name="condensa", storage=storage)
    return [t.user_attrs.get("fidelity") for t in study.trials]


@pytest.mark.slow
def test_an_interrupted_search_gives_the_same_shares(tmp_path: Path) -> None:
    straight = frugal(tmp_path / "a", max_trials=4).fit(slow(), **loaders())
    first = frugal(tmp_path / "b", max_trials=2).fit(slow(), **loaders())
    resumed = frugal(tmp_path / "b", max_trials=4).fit(slow(), **loaders())
    facts = [
        [(t.values, t.fidelity, t.steps, t.metric) for t in r.trials] for r in (straight, resumed)
    ]
    assert facts[0] == facts[1] and 1 < len(first.trials) < len(resumed.trials)
    recorded = [None if t.fidelity == 1 else t.fidelity for t in resumed.trials]
    assert attributes(tmp_path / "b") == recorded and 0.25 in recorded


def test_a_search_may_go_on_with_full_trials_only(tmp_path: Path) -> None:
    first = frugal(tmp_path, max_trials=2).fit(slow(), **loaders())
    assert any(t.fidelity < 1 for t in first.trials)
    # Also by a method, or for an aim, that has no use for what the cheap ones have shown.
    spent = sum(t.fidelity for t in first.trials)
    result = frugal(tmp_path, max_trials=4, fidelity=1.0, method="bisection").fit(
        slow(), **loaders()
    )
    further = result.trials[len(first.trials) :]
    assert {t.fidelity for t in further} == {1.0} and len(further) == int(4 - spent)


def test_an_older_study_goes_on_with_cheap_trials(tmp_path: Path) -> None:
    first = frugal(tmp_path, fidelity=1.0, max_trials=1).fit(slow(), **loaders())
    assert len(first.trials) == 1 and first.trials[0].fidelity == 1
    assert attributes(tmp_path) == [None]
    assert "of the training" not in str(first) + first.to_html()
    result = frugal(tmp_path, max_trials=5).fit(slow(), **loaders())
    check_shares(result, 5)


def test_only_full_trials_are_parents(tmp_path: Path) -> None:
    result = frugal(tmp_path, warm_start=1 / 3, max_trials=4).fit(slow(), **loaders())
    warm = [t for t in result.trials if t.parent is not None]
    assert warm
    for trial in warm:
        parent = result.trials[trial.parent]
        assert parent.fidelity == 1
        u, origin = (-math.log(t.values["density"]) for t in (trial, parent))
        share = trial.fidelity * max(1 / 3, (u - origin) / u)
        assert trial.steps == math.ceil(share * EPOCHS) * BATCHES


@pytest.mark.slow
def test_workers_are_told_the_share(tmp_path: Path) -> None:
    with ProcessPool(2, threads=1) as pool:
        result = frugal(tmp_path, executor=pool, early_abort=True).fit(slow(), **loaders())
    check_shares(result, 5)


# -- arguments -----------------------------------------------------------------------------------


@given(fidelity=st.floats(0.01, 0.99), epochs=st.integers(2, 300))
def test_the_share_is_one_of_whole_epochs(fidelity: float, epochs: int) -> None:
    least = math.ceil(fidelity * epochs)
    if least == epochs:
        with pytest.raises(ValueError, match="must leave out some of the training"):
            share_of_training(fidelity, {"max_epochs": epochs})
    else:
        assert share_of_training(fidelity, {"max_epochs": epochs}) == least / epochs


@pytest.mark.parametrize("fidelity", [0, -0.5, 1.5, "a quarter", True])
def test_a_share_out_of_range_is_refused(tmp_path: Path, fidelity: object) -> None:
    with pytest.raises(ValueError, match=r"fidelity must be a share in \(0, 1\], got"):
        search(tmp_path, fidelity=fidelity)


def test_shares_are_refused_where_they_are_of_no_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got neither"):
        frugal(tmp_path, trainer={"max_time": "00:01:00:00"})
    with pytest.raises(ValueError, match="needs method='auto', got method='bisection'"):
        frugal(tmp_path, method="bisection")
    unfit: list[dict[str, Any]] = [
        {"metric": "val_loss", "mode": "min"},
        {"tolerance": None, "budget": 1e4},
        {"scheme": Compose([Prune(Range(0.1, 1.0)), Quantize(Choice(["float16", "int8"]))])},
    ]
    for i, changes in enumerate(unfit):
        with pytest.raises(ValueError, match="fidelity < 1 is for searches of one density"):
            frugal(tmp_path / str(i), **changes).fit(slow(), **loaders())
