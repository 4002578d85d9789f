"""Searches for the best metric within a budget."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import Toy, loaders, search, toy

from lightning_condensa import CompressedModel, MemoryFootprint, Prune, Range, per_group
from lightning_condensa.search import CondensaSampler
from lightning_condensa.search.budget import log_within, possible
from lightning_condensa.search.feasibility import Outlook
from lightning_condensa.search.goal import Goal
from lightning_condensa.search.improvement import MetricImprovement, log_expected_excess
from lightning_condensa.search.problem import Observation, Problem, best_within
from lightning_condensa.search.strategies import make_strategy
from lightning_condensa.search.synthetic import SyntheticCliff
from lightning_condensa.search.synthetic_groups import SyntheticGroups


def line(budget: float | None, count: int = 41) -> Problem:
    u = torch.linspace(0.0, 4.0, count, dtype=torch.float64)
    dense = Observation(torch.zeros(1), 0.95, 1e-6, 0.0)
    return Problem(u[:, None], u, dense, 0.94, 1e-6, cliff=True, budget=budget)


def seen(u: float, utility: float | None, metric: float | None = 0.9) -> Observation:
    point = torch.tensor([u], dtype=torch.float64)
    return Observation(point, metric, 1e-6, utility, diverged=metric is None)


class Normals:
    """Two members with given normals at the points 0, 1, 2, ..."""

    def __init__(self, mean: Tensor, sd: Tensor, weights: Tensor) -> None:
        self.mean, self.sd, self.log_weights = mean, sd, weights.log()

    def outlook(self, X: Tensor) -> Outlook:  # noqa: N803
        at = X[..., 0].long()
        mean, sd = (part[:, at].movedim(0, -2) for part in (self.mean, self.sd))
        return Outlook(mean, sd, self.log_weights)

    def worth(self, seen: Observation) -> Tensor:
        return torch.full((len(self.mean),), seen.metric, dtype=torch.float64)


@given(z=st.floats(-37, 50))
def test_expected_excess_is_the_integral(z: float) -> None:
    grid = torch.linspace(0, 40, 400_001, dtype=torch.float64)  # of z + ε where it is positive
    density = torch.exp(-0.5 * (grid - max(z, -30.0)) ** 2) / math.sqrt(2 * math.pi)
    if z > -30:
        found = float(log_expected_excess(torch.tensor(z, dtype=torch.float64)).exp())
        assert found == pytest.approx(float(torch.trapezoid(grid * density, grid)), rel=1e-6) or (
            z > 30 and found == pytest.approx(z)
        )


def test_expected_excess_is_finite_and_grows_everywhere() -> None:
    z = torch.cat([-torch.logspace(8, -3, 2000).double(), torch.logspace(-3, 8, 2000).double()])
    value = log_expected_excess(z)
    assert bool(value.isfinite().all()) and bool((value.diff() > 0).all())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), pending=st.integers(0, 2), incumbent=st.booleans())
def test_improvement_is_the_expectation_over_members_and_pending_trials(
    seed: int, pending: int, incumbent: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    sd = 0.2 + torch.rand(2, 5, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    model = Normals(mean, sd, weights)
    beaten = [seen(0.0, 0.0, metric=0.3)] if incumbent else []
    points = torch.arange(5, dtype=torch.float64)[:, None]
    waiting = points[:pending] + 3
    found = [
        MetricImprovement(model, beaten, waiting, seed=s)(points[:3]).exp()
        for s in range(400 if pending else 1)
    ]
    value = torch.stack(found).mean(0)
    drawn = mean[:, None] + sd[:, None] * torch.randn(
        2, 200_000, 5, generator=generator, dtype=torch.float64
    )
    low, high = mean[:, :3].aminmax()
    floor = 0.3 if incumbent else float(2 * low - high - 1e-6)
    rivals = torch.full((2, 200_000), floor, dtype=torch.float64)
    if pending:
        rivals = torch.maximum(rivals, drawn[..., 3 : 3 + pending].amax(-1))
    gain = (drawn[..., :3] - rivals[..., None]).clamp(min=0).mean(1)
    torch.testing.assert_close(value, weights @ gain, rtol=0.1, atol=0.02)


def test_without_errors_the_edge_stays_where_it_is() -> None:
    problem = line(budget=2.0)
    assert problem.utility[possible(problem, [])].min() == 2.0
    exact = [seen(3.0, 3.0), seen(2.0, 2.0)]
    assert problem.utility[possible(problem, exact)].min() == 2.0
    chance = log_within(problem, exact).exp()
    assert chance[20] == pytest.approx(0.5) and chance[22] > 0.999 and chance[18] < 0.001
    assert bool(possible(line(None), exact).all()) and not bool(log_within(line(None), exact).any())


def test_an_objective_that_comes_out_worse_moves_the_edge() -> None:
    problem = line(budget=2.0)
    slow = [seen(u, u - 0.3) for u in (2.0, 2.2, 2.5)]
    edge = float(problem.utility[possible(problem, slow)].min())
    assert 2.2 <= edge <= 2.35  # shrunk by a quarter
    noisy = [seen(u, u + e) for u, e in ((2.0, 0.2), (2.2, -0.2), (2.5, 0.2), (2.6, -0.2))]
    chance = log_within(problem, noisy).exp()
    assert 0.6 < chance[21] < 0.8 and chance[30] > 0.999


@pytest.mark.parametrize("name", ["condensa", "random", "grid"])
def test_nothing_beyond_the_budget_is_proposed(name: str) -> None:
    problem = line(budget=3.5)
    history: list[Observation] = []
    for trial in range(6):
        (index,) = make_strategy(name).propose(problem, history, None, 1, trial)
        utility = float(problem.utility[index])
        assert utility >= 3.5
        history.append(seen(utility, utility, None if trial == 1 else 0.5))
    assert make_strategy(name).propose(problem, history, None, 1, 9) == []


@pytest.mark.parametrize("name", ["paper", "bisection"])
def test_methods_that_need_a_level_say_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' looks for a level of the metric"):
        make_strategy(name).propose(line(budget=2.0), [], None, 1, 0)


def test_parallel_proposals_differ_and_keep_the_budget() -> None:
    problem = line(budget=1.0)
    history = [seen(1.0, 1.0, 0.94)]
    chosen = make_strategy("auto").propose(problem, history, problem.candidates[[11, 12]], 4, 0)
    assert len({*chosen, 10, 11, 12}) == 7
    assert float(problem.utility[chosen].min()) >= 1.0


def lost(name: str, case: SyntheticCliff, budget: float, trials: int) -> float:
    """True accuracy short of the best within the budget."""
    problem = case.problem(budget=budget)
    history, chosen = [], []
    for trial in range(trials):
        (index,) = make_strategy(name).propose(problem, history, None, 1, trial)
        chosen.append(index)
        history.append(case.observe(index))
    best = best_within(history, budget)
    assert best is not None
    return case.best_within(budget) - float(case.accuracy[chosen[best]])


@pytest.mark.slow
def test_one_density_comes_near_to_the_best_within_the_budget() -> None:
    cases = [SyntheticCliff.draw(seed) for seed in range(8)]
    budgets = [min(c.optimum * (0.6 + 0.1 * i), 5.5) for i, c in enumerate(cases)]
    ours, chance = (
        statistics.fmean(lost(name, c, b, 4) for c, b in zip(cases, budgets, strict=True))
        for name in ("condensa", "random")
    )
    assert ours < 0.005
    assert ours < chance - 0.05


def lost_in_groups(name: str, case: SyntheticGroups, budget: float, trials: int) -> float:
    problem = case.problem(budget=budget)
    history: list[Observation] = []
    for trial in range(trials):
        point = make_strategy(name).suggest(problem, history, None, 1, trial)[0]
        history.append(case.observe(point))
    best = best_within(history, budget)
    assert best is not None
    level = case.domain.nearest(history[best].point[None])
    return case.best_within(budget) - float(case.accuracy(level))


@pytest.mark.parametrize(
    ("seeds", "trials"), [((2, 3), 6), pytest.param(range(6), 12, marks=pytest.mark.slow)]
)
def test_groups_beat_one_density_and_chance(seeds: Any, trials: int) -> None:
    ours, chance, single = [], [], []
    for seed in seeds:
        case = SyntheticGroups.draw(seed, groups=6)
        budget = case.optimum * (0.9 + 0.1 * (seed % 4))
        ours.append(lost_in_groups("condensa", case, budget, trials))
        chance.append(lost_in_groups("random", case, budget, trials))
        level = case.domain.diagonals()
        kept = level[case.domain.utility(level) >= budget]
        single.append(case.best_within(budget) - float(case.accuracy(kept).max()))
    assert statistics.fmean(ours) < 0.25 * statistics.fmean(single)
    assert statistics.fmean(ours) < 0.25 * statistics.fmean(chance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either tolerance.* or budget.* got tolerance=None and budget=None"),
        ({"tolerance": 0.1, "budget": 1.0}, "got tolerance=0.1 and budget=1.0"),
        ({"tolerance": -0.1}, "tolerance must be a finite number >= 0, got -0.1"),
        ({"budget": math.inf}, "budget must be a finite number, got inf"),
        ({"budget": True}, "budget must be a finite number, got True"),
    ],
)
def test_wrong_goals_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Goal("max", "min", **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tolerance": None}, "either tolerance"),
        ({"budget": 1500}, "got tolerance=0.05 and budget=1500"),
        ({"tolerance": None, "budget": 1500, "method": "bisection"}, "method='bisection'"),
        ({"tolerance": None, "budget": 1500, "confidence": 0.9}, "confidence=0.9"),
        ({"objective": "size"}, "one of .*'memory'.* got 'size'"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(tmp_path, **changes)


def within(directory: Path, budget: float = 1500, **changes: Any) -> Any:
    return search(directory, **{"tolerance": None, "budget": budget, **changes})


def test_search_finds_the_best_within_the_budget_and_resumes(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    model = toy(journal=journal)
    short = within(tmp_path / "a", max_trials=2, objective="memory").fit(model, **loaders())
    assert short.level is None and short.target is None and short.budget == 1500
    result = within(tmp_path / "a", max_trials=4).fit(model, **loaders())
    assert len(journal.read_text().splitlines()) == 4
    kept = [t for t in result.trials if t.objective <= 1500]
    assert {t.number for t in kept} == {t.number for t in result.trials if t.state == "feasible"}
    assert result.best is max(kept, key=lambda t: t.metric)
    assert result.best.metric == pytest.approx(0.95, abs=0.002)  # the cliff is at 1,300 bytes
    straight = within(tmp_path / "b", max_trials=4).fit(toy(), **loaders())
    assert [t.values for t in result.trials] == [t.values for t in straight.trials]


@pytest.mark.slow
def test_the_study_holds_what_resuming_under_another_budget_needs(tmp_path: Path) -> None:
    first = within(tmp_path, max_trials=3).fit(toy(), **loaders())
    study = optuna.load_study(study_name="condensa", storage=f"sqlite:///{tmp_path}/study.db")
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert [t.value for t in study.trials] == [t.metric for t in first.trials]
    for trial, own in zip(study.trials, first.trials, strict=True):
        assert (trial.constraints["budget"] <= 0) == (own.objective <= 1500)
    assert study.best_trial.number == first.best.number
    second = within(tmp_path, budget=1000, max_trials=5).fit(toy(), **loaders())
    assert [t.state for t in second.trials[:3]] == ["infeasible"] * 3
    assert second.best.number >= 3 and second.best.objective <= 1000
    with pytest.raises(ValueError, match=r"of another search .*goal: 'budget' there, None here"):
        search(tmp_path).fit(toy(), **loaders())


def test_a_budget_out_of_reach_is_refused_before_training(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with pytest.raises(ValueError, match=r"budget=4 is out of reach: .* is 6.* bytes"):
        within(tmp_path, budget=4).fit(toy(journal=journal), **loaders())
    assert not journal.exists()


def test_a_loss_is_minimized_above_a_bound(tmp_path: Path) -> None:
    def zeros(compressed: CompressedModel) -> float:
        return float((compressed.module.layer.weight == 0).sum())

    changes = {"objective": zeros, "direction": "max", "metric": "val_loss", "mode": "min"}
    result = within(tmp_path, budget=3900, max_trials=5, **changes).fit(toy(), **loaders())
    kept = [t for t in result.trials if t.objective >= 3900]
    assert result.best is min(kept, key=lambda t: t.metric)
    assert result.best.metric < 0.47  # at 100 of 4,000 weights it is 0.447
    assert "zeros ≥ 3,900" in result.summary()


@pytest.mark.slow
def test_nothing_within_the_budget_is_said_with_the_nearest_miss(tmp_path: Path) -> None:
    class Grows(MemoryFootprint):
        """Larger after training than it seemed."""

        def __call__(self, compressed: CompressedModel) -> float:
            trained = compressed.module.layer.weight.requires_grad and hasattr(
                compressed.module, "was_trained"
            )
            return super().__call__(compressed) * (2.0 if trained else 1.0)

        def details(self, compressed: CompressedModel) -> dict[str, Any]:
            return {"value": self(compressed)}

    class Trained(Toy):
        def on_train_end(self) -> None:
            self.was_trained = True

    torch.manual_seed(0)
    model = Trained()
    result = within(tmp_path, objective=Grows(), max_trials=1).fit(model, **loaders())
    assert result.best is None and result.nearest_miss is result.trials[0]
    text = result.summary()
    assert "No trial is feasible" in text and "≤ 1,500 bytes" in text and "Nearest miss" in text
    result.save(tmp_path / "out")
    later = within(tmp_path, objective=Grows(), max_trials=4).fit(model, **loaders())
    assert later.best is not None and later.best.objective <= 1500  # it has learned that they grow


@pytest.mark.slow
def test_report_plots_and_table_tell_of_the_budget(tmp_path: Path) -> None:
    result = within(tmp_path, max_trials=2, budget=1600).fit(toy(), **loaders())
    page = result.to_html()
    assert "MemoryFootprint ≤ 1,600 bytes" in page and "<dt>budget</dt>" in page
    assert "tolerance" not in page
    folder = result.save(tmp_path / "out")
    record = json.loads((folder / "result.json").read_text())
    assert record["budget"] == 1600 and record["best"] == result.best.number
    trace = result.plot().axes[1]
    assert trace.get_ylabel() == "val_acc"
    assert "the best one with MemoryFootprint ≤ 1,600 bytes" in result.summary()


def test_the_best_is_confirmed_by_another_run(tmp_path: Path) -> None:
    result = within(tmp_path, max_trials=3, confirm=2).fit(toy(), **loaders())
    assert [t.confirms for t in result.trials] == [None] * 3 + [result.best.number]
    assert "confirmed by another run" in result.summary()


def test_diverged_trials_are_learned_from(tmp_path: Path) -> None:
    result = within(tmp_path, budget=12_000, max_trials=4).fit(toy(trap="nan"), **loaders())
    assert {t.state for t in result.trials} <= {"feasible", "diverged", "infeasible"}
    again = within(tmp_path, budget=1500, max_trials=6).fit(toy(trap="nan"), **loaders())
    assert len(again.trials) == 6 and again.trials[-1].state == "diverged"
    assert len({t.values["density"] for t in again.trials}) == 6


class TwoLayers(Toy):
    """A layer that bears nothing, and one that bears all."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(100, 40, bias=False)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = (self.layer(batch[0]) + self.other(batch[0])).square().mean() * 1e-6
        return loss

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        kept = [float((p != 0).double().mean()) for p in (self.layer.weight, self.other.weight)]
        lost = [max(math.log(cliff / k), 0.0) for cliff, k in zip((0.5, 0.02), kept, strict=True)]
        self.log("val_acc", 0.95 - 0.3 * min(sum(lost), 3.0))


@pytest.mark.slow
def test_several_groups_share_the_budget_as_they_need(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoLayers()
    scheme = per_group(Prune(Range(0.005, 1.0, log=True)), model)
    result = within(tmp_path, scheme=scheme, objective="parameters", budget=2400, max_trials=7).fit(
        model, **loaders()
    )
    assert result.best is not None and result.best.objective <= 2400
    fragile, sturdy = (v for _, v in sorted(result.best.values.items()))
    assert fragile > 2 * sturdy
    assert result.best.metric > 0.92  # one density for both, 0.3, has 0.80


def test_sampler_keeps_a_budget() -> None:
    model = toy()
    sampler = CondensaSampler(
        Prune(Range(0.005, 1.0, log=True)), model, MemoryFootprint(), baseline=0.95, budget=1500
    )

    def objective(trial: optuna.Trial) -> float:
        compressed = CompressedModel.compress(model, sampler.suggest(trial))
        density = trial.params["density"]
        metric = 0.95 - 0.5 * min(max(math.log(0.05 / density), 0.0), 1.0)
        return sampler.report(trial, compressed, math.nan if trial.number == 1 else metric)

    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=5)
    assert study.trials[1].state == optuna.trial.TrialState.FAIL
    assert len({t.params["density"] for t in study.trials}) == 5
    best = study.best_trial
    assert best.constraints["budget"] <= 0 and best.value > 0.94
    with pytest.raises(ValueError, match="either tolerance"):
        CondensaSampler(Prune(Range(0.1, 1.0)), model, MemoryFootprint(), baseline=0.95)


class Steep(Toy):
    """Loses its metric from the first weights on."""

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        drop = 3.0 * max(math.log(0.5 / self._density()), 0.0)
        self.log("val_acc", 0.95 - min(drop, 0.9))


def test_what_cannot_beat_the_best_is_aborted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    changes = {"method": "random", "early_abort": True, "warm_start": 0, "seed": 3}
    trainer = {"max_epochs": 4, "accelerator": "cpu"}
    result = within(tmp_path, budget=14_000, max_trials=7, trainer=trainer, **changes).fit(
        Steep(), **loaders()
    )
    best = result.best
    assert best is not None and best.metric == pytest.approx(0.95)
    aborted = [t for t in result.trials if t.state == "aborted"]
    assert aborted and all(t.number > best.number and t.bound < best.metric for t in aborted)
