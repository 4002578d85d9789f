"""Trials that are ended because they can no longer reach the level."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Toy, loaders, search

from lightning_condensa.search import ProcessPool, SearchResult
from lightning_condensa.search.abort import LEAST_CURVES, AbortRule
from lightning_condensa.search.domain import Axis, Domain
from lightning_condensa.search.ensemble import DamageMixture
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.store import Record
from lightning_condensa.search.surrogates import BilogGP, CliffEnsemble
from lightning_condensa.search.trial import RECORD_FILE, TrialOutcome


def rule(finals: list[float], target: float = 0.9, sign: float = 1.0) -> AbortRule:
    """Trials that are 0.1 short of their end at a third, and 0.02 at two thirds."""
    curves = tuple(
        ((1 / 3, f - sign * 0.1), (2 / 3, f - sign * 0.02), (1.0, f), (1.0, f)) for f in finals
    )
    return AbortRule(curves, target, sign, scale=0.05, noise=0.002)


FINALS = [0.94, 0.93, 0.90, 0.80, 0.70, 0.60, 0.50]


def test_the_ceiling_follows_the_curves() -> None:
    known = rule(FINALS)
    at_two_thirds = known.ceiling(2 / 3, 0.58)
    assert 0.60 < at_two_thirds < 0.85 and known.hopeless(at_two_thirds)
    early = known.ceiling(1 / 3, 0.58)
    assert early > at_two_thirds
    assert not known.hopeless(known.ceiling(1 / 3, 0.79))
    assert not known.hopeless(known.ceiling(2 / 3, 0.88))
    assert known.ceiling(0.1, 0.2) == math.inf  # nobody was validated so early


def test_less_is_better_is_the_mirror_image() -> None:
    up, down = rule(FINALS), rule([-f for f in FINALS], target=-0.9, sign=-1.0)
    for progress, metric in [(1 / 3, 0.7), (2 / 3, 0.78), (0.5, 0.9)]:
        assert down.ceiling(progress, -metric) == pytest.approx(-up.ceiling(progress, metric))
    assert down.hopeless(-0.85) and not down.hopeless(-0.95)


def test_a_trial_worse_than_all_others_is_not_judged_by_good_ones() -> None:
    easy = rule([0.941, 0.94, 0.939, 0.9405])
    assert not easy.hopeless(easy.ceiling(2 / 3, 0.70))


@given(
    finals=st.lists(st.floats(0.2, 0.99), min_size=LEAST_CURVES, max_size=12),
    metric=st.floats(0.0, 0.99),
    progress=st.floats(0.34, 0.99),
)
def test_a_trial_that_is_feasible_already_is_never_hopeless(
    finals: list[float], metric: float, progress: float
) -> None:
    known = rule(finals)
    ceiling = known.ceiling(progress, metric)
    assert ceiling >= metric - 1e-9
    assert metric < known.target or not known.hopeless(ceiling)


def made(number: int, status: str = "complete", parent: int | None = None, **more: Any) -> Record:
    outcome = TrialOutcome(
        status,  # type: ignore[arg-type]
        **{"metric": 0.9, "curve": [[0.5, 0.8]], "parent": parent, **more},
    )
    return Record(number, {}, outcome, "nowhere", 1e-6, "binomial", None)


def test_only_finished_trials_of_the_same_kind_are_evidence() -> None:
    facts: dict[str, Any] = {"target": 0.9, "sign": 1.0, "tolerance": 0.05, "variance": 1e-6}
    cold = [made(i) for i in range(4)]
    assert AbortRule.learned(cold[:3], warm=False, **facts) is None
    assert AbortRule.learned(cold, warm=True, **facts) is None
    warm = [made(i, parent=0) for i in range(4, 7)]
    other = [made(7, "aborted", 0), made(8, "diverged", 0, metric=None), made(9, curve=[])]
    known = AbortRule.learned([*cold, *warm, *other], warm=False, **facts)
    assert known is not None and len(known.curves) == 4
    assert AbortRule.learned([*cold, *warm, *other], warm=True, **facts) is None


# -- surrogates ----------------------------------------------------------------------------------

U = torch.linspace(0.05, 5.0, 60, dtype=torch.float64).unsqueeze(-1)
DENSE = Observation(torch.zeros(1), metric=0.95, variance=1e-6, utility=0.0)
PROBLEM = Problem(U, U[:, 0], DENSE, 0.94, 1e-6, cliff=True)


def bounded(u: float, bound: float) -> Observation:
    return Observation(torch.tensor([u]), None, 1e-6, u, bound=bound)


@settings(max_examples=20, deadline=None)
@given(
    u=st.floats(0.5, 4.5),
    short=st.floats(0.0, 0.5),
    history=st.lists(st.tuples(st.floats(0.1, 1.0), st.floats(0.3, 0.95)), max_size=3),
)
def test_a_bound_below_the_level_never_raises_the_chances_of_sparser_points(
    u: float, short: float, history: list[tuple[float, float]]
) -> None:
    # Of denser points: a sparser one that was better would make the bound look like noise.
    seen = [Observation(torch.tensor([u * part]), m, 1e-6, u * part) for part, m in history]
    sparser = U[U[:, 0] >= u]
    # All the draws, so that the two ensembles differ in nothing but their weights.
    before, after = (
        CliffEnsemble(PROBLEM, told, seed=0, draws=2000, members=2000)
        for told in (seen, [*seen, bounded(u, PROBLEM.level - short)])
    )
    chance = [m.feasibility(sparser).probability for m in (before, after)]
    assert bool((chance[1] <= chance[0] + 1e-3).all())


def test_a_lower_bound_says_more() -> None:
    probe = torch.tensor([[2.0], [3.0]]).double()
    chances = [
        CliffEnsemble(PROBLEM, told, seed=0).feasibility(probe).probability
        for told in ([], [bounded(3.0, 0.94)], [bounded(3.0, 0.5)])
    ]
    assert chances[1][1] < 0.15 < chances[0][1]
    assert chances[2][0] < chances[1][0]
    diverged = Observation(torch.tensor([3.0]), None, 1e-6, 3.0, diverged=True)
    same = CliffEnsemble(PROBLEM, [diverged], seed=0).feasibility(probe).probability
    assert torch.equal(same, chances[1])


def test_the_process_takes_a_bound_for_less() -> None:
    problem = replace(PROBLEM, cliff=False)
    good = Observation(torch.tensor([1.0]), 0.945, 1e-6, 1.0)
    probe = torch.tensor([[[1.0]], [[3.0]], [[4.0]]]).double()
    before = BilogGP(problem, [good], seed=0).feasibility(probe).probability.flatten()
    after = BilogGP(problem, [good, bounded(3.0, 0.935)], seed=0)
    chance = after.feasibility(probe).probability.flatten()
    assert chance[0] > 0.8
    assert bool((chance[1:] < before[1:]).all()) and chance[1] < 0.2
    assert float(after.predict(torch.tensor([[3.0]]).double())[0]) < 0.935


def test_damages_stay_beyond_a_bound() -> None:
    levels = torch.linspace(0.0, 4.0, 33, dtype=torch.float64).unsqueeze(-1)
    axes = (Axis(levels, origin=0.0), Axis(levels, origin=0.0))
    domain = Domain(axes, lambda level: domain.points(level).sum(-1))
    points = torch.rand(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = Observation(torch.zeros(2), 0.95, 1e-6, 0.0)
    problem = Problem(
        4 * points, points.sum(-1), dense, 0.94, 1e-6, cliff=False, domain=domain, accuracy=True
    )
    at = torch.tensor([2.0, 2.0]).double()
    probe = torch.stack([at, at + 0.5, torch.tensor([0.3, 0.3]).double()])
    models = [
        DamageMixture(problem, told, seed=0)
        for told in ([], [Observation(at, None, 1e-6, 4.0, bound=0.8)])
    ]
    before, after = (m.feasibility(probe).probability for m in models)
    assert bool((after[:2] < before[:2]).all()) and after[0] < 0.05
    assert after[2] > 0.5
    assert float(models[1].predict(at[None])[0]) < 0.83


def test_an_observation_is_measured_diverged_or_bounded() -> None:
    with pytest.raises(ValueError, match="exactly when diverged or bounded"):
        Observation(torch.zeros(1), 0.9, 1e-6, None, bound=0.8)
    with pytest.raises(ValueError, match="bound must be finite"):
        Observation(torch.zeros(1), None, 1e-6, None, bound=math.inf)


# -- whole searches ------------------------------------------------------------------------------


class Learner(Toy):
    """Its accuracy comes back in training: what is missing falls by a factor in each epoch."""

    def validation_step(self, batch: tuple[torch.Tensor], batch_idx: int) -> None:
        density = self._density()
        drop = 0.5 * min(max(math.log(0.05 / density), 0.0), 1.0)
        missing = 0.0
        if self.trainer.state.fn == "fit" and density < 0.99:
            missing = 0.2 * 0.4 ** (self.current_epoch + 1)
        self.log_dict({"val_acc": 0.95 - drop - missing, "val_loss": 0.1 + drop + missing})


def learner() -> Learner:
    torch.manual_seed(0)
    return Learner()


def aborting(directory: Path, **changes: Any) -> Any:
    settings = {"max_epochs": 6, "accelerator": "cpu"}
    arguments = {
        "trainer": settings, "early_abort": True, "warm_start": 0, "method": "grid",
        "max_trials": 10,
    }  # fmt: skip
    return search(directory, **{**arguments, **changes})


def check_aborted(result: SearchResult, epochs: int = 6, batches: int = 4) -> list[int]:
    found = []
    for trial in result.trials:
        if trial.state != "aborted":
            assert trial.bound is None and trial.steps == epochs * batches
            continue
        found.append(trial.number)
        assert trial.steps < epochs * batches
        assert trial.metric is not None and trial.bound is not None
        assert trial.metric <= trial.bound < result.target
        assert "val_acc would end <" in trial.message and "short of 0.9" in trial.message
        assert len(trial.curve) == trial.steps // batches
        assert trial.path.exists() and trial.probability == 0.0
        record = json.loads((trial.directory / RECORD_FILE).read_text())
        assert record["status"] == "aborted" and record["bound"] == trial.bound
    return found


def test_a_hopeless_trial_ends_early_and_is_recorded(tmp_path: Path) -> None:
    eight = {"max_trials": 8}
    result = aborting(tmp_path, **eight).fit(learner(), **loaders())
    found = check_aborted(result)
    assert found and min(found) >= LEAST_CURVES
    full = aborting(tmp_path / "full", early_abort=False, **eight).fit(learner(), **loaders())
    assert [t.state for t in full.trials if t.number in found] == ["infeasible"] * len(found)
    for trial in (result.trials[n] for n in found):
        assert full.trials[trial.number].metric <= trial.bound
    assert "aborted" in str(result) and "aborted at" in result.to_html()
    assert result.best.values == full.best.values
    result.plot()
    # By a tolerance that its model keeps, an aborted trial is feasible: it was evaluated.
    loose = aborting(tmp_path, tolerance=0.6, **eight).fit(learner(), **loaders())
    assert {t.state for t in loose.trials} == {"feasible"}


@pytest.mark.slow
def test_an_interrupted_search_aborts_the_same_trials(tmp_path: Path) -> None:
    straight = aborting(tmp_path / "a").fit(learner(), **loaders())
    aborting(tmp_path / "b", max_trials=5).fit(learner(), **loaders())
    resumed = aborting(tmp_path / "b").fit(learner(), **loaders())
    assert [(t.state, t.steps, t.bound) for t in resumed.trials] == [
        (t.state, t.steps, t.bound) for t in straight.trials
    ]


@pytest.mark.slow
def test_min_epochs_are_kept(tmp_path: Path) -> None:
    settings = {"max_epochs": 6, "min_epochs": 6, "accelerator": "cpu"}
    result = aborting(tmp_path, trainer=settings).fit(learner(), **loaders())
    assert check_aborted(result) == []


@pytest.mark.slow
def test_workers_abort_trials(tmp_path: Path) -> None:
    with ProcessPool(2, threads=1) as pool:
        result = aborting(tmp_path, executor=pool).fit(learner(), **loaders())
    assert all(t.state != "failed" for t in result.trials)
    assert check_aborted(result)
