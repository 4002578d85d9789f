"""Searches under several objectives."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from toy import Toy, loaders, search, toy

from lightning_condensa import (
    Choice,
    Compose,
    CompressedModel,
    MemoryFootprint,
    Prune,
    Quantize,
    Range,
    per_group,
)
from lightning_condensa.plots import plot_front, search_plots
from lightning_condensa.search import SearchResult
from lightning_condensa.search.domain import Domain
from lightning_condensa.search.feasibility import Feasibility
from lightning_condensa.search.observation import Observation
from lightning_condensa.search.pareto import front, gains, hypervolume, knee
from lightning_condensa.search.problem import Problem
from lightning_condensa.search.strategies import Strategy, make_strategy
from lightning_condensa.search.synthetic_groups import SyntheticGroups
from lightning_condensa.search.volume import VolumeImprovement

rows = st.lists(
    st.tuples(st.integers(-2, 6), st.integers(-2, 6), st.integers(-2, 6)), min_size=1, max_size=6
)


def cells(values: Tensor) -> set[tuple[int, ...]]:
    """The unit cubes above the origin that integer rows dominate."""
    found: set[tuple[int, ...]] = set()
    for row in values.long().tolist():
        found |= set(itertools.product(*(range(max(v, 0)) for v in row)))
    return found


@settings(deadline=None)
@given(points=rows, columns=st.integers(2, 3))
def test_hypervolume_and_front_count_the_dominated_cells(
    points: list[tuple[int, int, int]], columns: int
) -> None:
    values = torch.tensor(points, dtype=torch.float64)[:, :columns]
    reference = torch.zeros(columns, dtype=torch.float64)
    whole = cells(values)
    assert hypervolume(values, reference) == pytest.approx(len(whole))
    kept = front(values)
    assert cells(values[kept]) == whole
    for i, row in enumerate(values):
        beaten = any(bool((o >= row).all() and (o > row).any()) for o in values)
        assert bool(kept[i]) == (not beaten)
    expected = [len(cells(values[: i + 1])) - len(cells(values[:i])) for i in range(len(values))]
    for i, row in enumerate(values):
        assert float(gains(row[None], values[:i], reference)) == pytest.approx(expected[i])


def test_knee_is_where_little_is_given_for_much() -> None:
    values = torch.tensor([[0.0, 10.0], [1.0, 9.8], [8.0, 9.0], [9.0, 3.0], [10.0, 0.0]])
    assert knee(values) == 2
    assert knee(values * torch.tensor([1.0, 100.0])) == 2  # whatever the units
    assert knee(values[:1]) == 0


class Chances:
    """Given probabilities of being feasible at the points 0, 1, 2, ..."""

    def __init__(self, chance: list[float]) -> None:
        self.margin = torch.special.ndtri(torch.tensor(chance, dtype=torch.float64))

    def feasibility(self, X: Tensor) -> Feasibility:  # noqa: N803
        margin = self.margin[X[..., 0].long()].unsqueeze(-2)
        return Feasibility(margin, torch.zeros(1, dtype=torch.float64))


def plain(utilities: list[list[float]]) -> Problem:
    known = torch.tensor(utilities, dtype=torch.float64)
    points = torch.arange(len(known), dtype=torch.float64)[:, None]
    dense = Observation(torch.zeros(1), 0.95, 1e-6, 0.0, further=(0.0,))
    return Problem(points, known[:, 0], dense, 0.94, 1e-6, cliff=False, further=known[:, 1:])


def measured(problem: Problem, index: int, metric: float = 0.95) -> Observation:
    return Observation(
        problem.candidates[index],
        metric,
        1e-6,
        float(problem.utilities[index, 0]),
        further=(float(problem.utilities[index, 1]),),
    )


def test_value_is_the_probability_times_what_the_volume_grows() -> None:
    problem = plain([[1.0, 1.0], [2.0, 2.0], [3.0, 0.5], [0.5, 0.5], [-1.0, 9.0]])
    model = Chances([0.9, 0.5, 0.2, 0.9, 0.9])
    history = [measured(problem, 0), measured(problem, 1, metric=0.5)]
    volume = VolumeImprovement(problem, model, history, seed=0)  # type: ignore[arg-type]
    value = volume(problem, problem.candidates[:0]).exp().tolist()
    assert value[1] == pytest.approx(0.5 * (math.sqrt(4.0) - 1.0))
    assert value[2] == pytest.approx(0.2 * (math.sqrt(1.0 + 1.0) - 1.0))
    assert value[3] == pytest.approx(0.0, abs=1e-6) == value[4]  # beaten; worse than dense
    assert volume.merits(problem)[1] == -math.inf


def test_pending_points_count_with_their_probability() -> None:
    problem = plain([[2.0, 2.0], [2.1, 2.1], [4.0, 0.4]])
    pending = problem.candidates[:1]

    def value(chance: float) -> list[float]:
        model = Chances([chance, 0.5, 0.5])
        volume = VolumeImprovement(problem, model, [], seed=0)  # type: ignore[arg-type]
        found: list[float] = volume(problem, pending).exp().tolist()
        return found

    sure, unsure = value(1 - 1e-9), value(1e-9)
    assert unsure[1] == pytest.approx(0.5 * 2.1) and sure[1] == pytest.approx(0.5 * 0.1, rel=1e-3)
    assert sure[2] > sure[1] and unsure[2] < unsure[1]  # what is near to it is worth less
    assert sure[1] < value(0.5)[1] < unsure[1]


def two(case: SyntheticGroups) -> Problem:
    """The size, and a latency to which other groups matter."""
    generator = torch.Generator().manual_seed(5 + case.seed)
    share = torch.softmax(1.2 * torch.randn(case.groups, generator=generator).double(), dim=0)
    u = case.domain.axes[0].levels[:, 0]

    def latency(level: Tensor) -> Tensor:
        return -torch.log(0.05 + 0.95 * (share * torch.exp(-u[level])).sum(-1))

    domain = replace(case.domain, further=(Domain(case.domain.axes, latency),))
    one = case.problem()
    return replace(
        one,
        domain=domain,
        baseline=replace(one.baseline, further=(0.0,)),
        further=domain.utilities(domain.nearest(one.candidates))[:, 1:],
    )


def volume_of(strategy: Strategy, case: SyntheticGroups, both: Problem, told: Problem) -> float:
    """Share of the square of what the size alone could be improved."""
    history: list[Observation] = []
    assert both.domain is not None
    for trial in range(10):
        point = strategy.suggest(told, history, None, 1, trial)[0]
        level = both.domain.nearest(point[None])
        further = (float(both.domain.further[0].utility(level)),)
        history.append(replace(case.observe(point), further=further))
    good = [both.utilities_of(seen) for seen in history if seen.feasible(both.level)]
    found = hypervolume(torch.stack(good), torch.zeros(2).double()) if good else 0.0
    return found / case.optimum**2


@pytest.mark.slow
def test_front_beats_one_objective_and_chance() -> None:
    shares = []
    for seed in range(6):
        case = SyntheticGroups.draw(seed, groups=6)
        both = two(case)
        ours, chance = make_strategy("auto"), make_strategy("random")
        told = [(ours, both), (ours, case.problem()), (chance, both)]
        shares.append([volume_of(strategy, case, both, problem) for strategy, problem in told])
    ours, one, chance = (statistics.fmean(column) for column in zip(*shares, strict=True))
    assert ours > one + 0.05
    assert ours > chance + 0.3


class Two(Toy):
    """A layer that is large, and one that is run often."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(40, 40, bias=False)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.other(self.layer(batch[0])).square().mean() * 1e-6
        return loss

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        kept = [float((p != 0).double().mean()) for p in (self.layer.weight, self.other.weight)]
        lost = [max(math.log(cliff / k), 0.0) for cliff, k in zip((0.3, 0.05), kept, strict=True)]
        self.log("val_acc", 0.95 - 0.3 * min(sum(lost), 3.0))


def macs(compressed: CompressedModel) -> float:
    layer, other = compressed.module.layer.weight, compressed.module.other.weight
    return float((layer != 0).sum() + 20 * (other != 0).sum())


def of_two(directory: Path, **changes: Any) -> SearchResult:
    torch.manual_seed(0)
    model = Two()
    pruned = per_group(Prune(Range(0.005, 1.0, log=True)), model)
    arguments = {
        "scheme": Compose([pruned, Quantize(Choice(["float16", "int8"]))]),
        "objective": ["memory", macs],
        "direction": "min",
    }
    return search(directory, **{**arguments, **changes}).fit(model, **loaders())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    directory = tmp_path_factory.mktemp("two")
    of_two(directory, max_trials=3)
    return of_two(directory, max_trials=7)  # resumed


def test_front_holds_the_feasible_trials_that_no_other_beats(found: SearchResult) -> None:
    assert [t.number for t in found.trials] == list(range(7))
    feasible = [t for t in found.trials if t.state == "feasible"]
    points = [tuple(t.objectives.values()) for t in feasible]
    assert found.pareto and all(t.objectives["MemoryFootprint"] == t.objective for t in feasible)
    for trial, (a, b) in zip(feasible, points, strict=True):
        assert macs(CompressedModel(trial.load(Two()), {}, Prune(0.5))) == b
        beaten = any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)
        assert (trial in found.pareto) == (not beaten)
    assert found.best is found.knee and found.best in found.pareto


def test_hypervolume_grows_from_the_dense_model(found: SearchResult) -> None:
    volumes = found.hypervolume
    assert len(volumes) == 7 and volumes == sorted(volumes) and volumes[-1] > 1
    first = next(t for t in found.trials if t.state == "feasible")
    sides = [
        math.log(found.baseline.objectives[name] / value)
        for name, value in first.objectives.items()
    ]
    assert volumes[first.number] == pytest.approx(math.prod(sides))
    assert all(v == 0 for v in volumes[: first.number])


def test_pick_chooses_from_the_front_within_budgets(found: SearchResult) -> None:
    front = found.pareto
    smallest = min(front, key=lambda t: t.objectives["MemoryFootprint"])
    fastest = min(front, key=lambda t: t.objectives["macs"])
    assert found.pick(macs=1e9) is smallest
    assert found.pick(memory=1e9) is fastest is found.pick(MemoryFootprint=1e9)
    assert found.pick(memory=smallest.objective) is smallest
    assert found.pick(memory=1.0) is None
    with pytest.raises(ValueError, match=r"some of .*'macs', 'memory'.* got \['latency'\]"):
        found.pick(latency=1.0)


def test_study_report_and_figures_hold_all_objectives(found: SearchResult, tmp_path: Path) -> None:
    run = found.trials[0].directory.parent.parent
    study = optuna.load_study(study_name="condensa", storage=f"sqlite:///{run}/study.db")
    for trial, own in zip(study.trials, found.trials, strict=True):
        assert trial.value == own.objective
        stored = trial.user_attrs["details"]["objectives"]
        assert {name: part["value"] for name, part in stored.items()} == own.objectives
    record = json.loads((found.save(tmp_path) / "result.json").read_text())
    assert record["best"] == found.best.number
    page = (tmp_path / "report.html").read_text()
    assert "macs" in page and page.count("<svg") == 4
    assert "is its knee" in found.summary() and "hypervolume" in found.summary()
    assert list(search_plots(found)) == ["groups", "front", "hypervolume", "timeline"]
    assert plot_front(found).axes[0].get_ylabel().startswith("macs")
    events = EventAccumulator(str(run / "overview"), size_guidance={"images": 0}).Reload()
    assert {"search/front", "search/hypervolume"} <= set(events.Tags()["images"])
    logged = [e.value for e in events.Scalars("search/hypervolume")]
    assert logged == pytest.approx(found.hypervolume, rel=1e-5)


def test_one_density_has_a_front_too(tmp_path: Path) -> None:
    objectives = ["memory", "parameters"]
    result = search(tmp_path, objective=objectives, max_trials=4).fit(toy(), **loaders())
    assert set(result.best.objectives) == {"MemoryFootprint", "Parameters"}
    assert result.hypervolume[-1] > 1 and result.curve is not None
    other = search(tmp_path, objective=["parameters", "memory"])
    with pytest.raises(ValueError, match=r"of another search .*objective"):
        other.fit(toy(), **loaders())


def test_one_objective_has_no_knee_and_picks_by_the_metric(tmp_path: Path) -> None:
    result = search(tmp_path, max_trials=4).fit(toy(), **loaders())
    for name in ("knee", "hypervolume"):
        with pytest.raises(ValueError, match=f"{name} needs a search with several objectives"):
            getattr(result, name)
    sizes = sorted(t.objective for t in result.pareto)
    picked = result.pick(memory=sizes[-1])
    assert picked.metric == max(t.metric for t in result.pareto)
    assert result.pick(memory=sizes[0]).objective == sizes[0]
    with pytest.raises(ValueError, match="plot_front needs several objectives"):
        plot_front(result)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": ["memory"]}, "two or more of different names"),
        ({"objective": ["memory", MemoryFootprint()]}, "two or more of different names"),
        ({"objective": ["memory", "size"]}, "one of .* got 'size'"),
        ({"objective": ["memory", macs]}, "needs direction"),
        ({"objective": ["memory", "flops"], "method": "paper"}, "any method but 'paper'"),
        (
            {"objective": ["memory", "flops"], "tolerance": None, "budget": 1e6},
            "several objectives .* need a tolerance",
        ),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(tmp_path, **changes)
