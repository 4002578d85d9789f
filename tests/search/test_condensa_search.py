"""Whole searches over a module whose metric is a known function of its density."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from toy import CLIFF, Toy, loaders, search, toy

from lightning_condensa import (
    Choice,
    Compose,
    CompressedModel,
    CondensaSearch,
    FilterPrune,
    MemoryFootprint,
    Parameters,
    Prune,
    Quantize,
    Range,
    load_compressed,
)
from lightning_condensa.objectives import Objective
from lightning_condensa.search import SearchResult

# With a drop of 0.5 per unit of u below the cliff, a tolerance of 0.05 is used up here.
EDGE = CLIFF * math.exp(-0.1)


@pytest.mark.parametrize(
    "method",
    [
        "auto",
        "bisection",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("paper", "random", "grid")),
    ],
)
def test_best_is_the_best_evaluated_feasible_trial(tmp_path: Path, method: str) -> None:
    model = toy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = search(tmp_path, method=method).fit(model, **loaders())
    assert len(result.trials) == 6
    feasible = [t for t in result.trials if t.metric is not None and t.metric >= result.level]
    assert result.best is min(feasible, key=lambda t: t.objective)
    assert result.level == pytest.approx(0.90)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len({t.values["density"] for t in result.trials}) == 6


def test_default_method_finds_the_cliff(tmp_path: Path) -> None:
    result = search(tmp_path, max_trials=8).fit(toy(), **loaders())
    assert result.best is not None
    assert 0.99 * EDGE <= result.best.values["density"] < 1.25 * EDGE


def test_result_loads_saves_and_plots(tmp_path: Path) -> None:
    result = search(tmp_path / "run", max_trials=3).fit(toy(), **loaders())
    best = result.best
    assert best is not None
    loaded = best.load(Toy())
    density = float(torch.count_nonzero(loaded.layer.weight)) / 4000
    assert density == pytest.approx(best.values["density"], abs=1 / 4000)
    assert best.path.stat().st_size == best.objective == best.details["file_bytes"]
    folder = result.save(tmp_path / "out")
    record = json.loads((folder / "result.json").read_text())
    assert record["best"] == best.number and len(record["trials"]) == 3
    again = load_compressed(folder / "best.condensa", Toy())
    assert torch.equal(again.layer.weight, loaded.layer.weight)
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    text = str(result)
    assert f"Trial {best.number} is best" in text and "MemoryFootprint" in text


@pytest.mark.slow
def test_loss_metric_is_minimized(tmp_path: Path) -> None:
    result = search(tmp_path, metric="val_loss", mode="min", max_trials=8).fit(toy(), **loaders())
    assert result.level == pytest.approx(0.15)
    assert result.best is not None and result.best.metric <= 0.15
    assert result.best.values["density"] < 2 * EDGE


@pytest.mark.usefixtures("figures")
def test_several_dimensions_and_choices(tmp_path: Path) -> None:
    scheme = Compose([Prune(Range(0.005, 1.0, log=True)), Quantize(Choice(["float16", "int8"]))])
    result = search(tmp_path, scheme=scheme, max_trials=8).fit(toy(), **loaders())
    assert result.curve is None
    assert result.best is not None
    assert set(result.best.values) == {"prune.density", "quantize.dtype"}
    result.plot()


@pytest.mark.slow
def test_callable_objective_both_directions(tmp_path: Path) -> None:
    def zeros(compressed):
        return float((compressed.module.layer.weight == 0).sum())

    most = search(tmp_path / "max", objective=zeros, direction="max", max_trials=5)
    least = search(tmp_path / "min", objective=zeros, direction="min", max_trials=5)
    found_most = most.fit(toy(), **loaders())
    found_least = least.fit(toy(), **loaders())
    assert found_most.best.objective > 3000
    assert found_least.best.objective < found_most.best.objective
    assert found_most.objective == "zeros"


@pytest.mark.usefixtures("figures")
def test_diverged_trials_are_infeasible_observations(tmp_path: Path) -> None:
    result = search(tmp_path, max_trials=7).fit(toy(trap="nan"), **loaders())
    states = {t.state for t in result.trials}
    assert states == {"feasible", "diverged"}
    assert all((t.state == "diverged") == (t.values["density"] < 0.5) for t in result.trials)
    assert 0.5 <= result.best.values["density"] < 0.8
    study = optuna.load_study(study_name="condensa", storage=f"sqlite:///{tmp_path}/study.db")
    diverged = next(t for t in study.trials if t.user_attrs["status"] == "diverged")
    assert diverged.state == optuna.trial.TrialState.COMPLETE
    assert all(v > 0 for v in diverged.constraints.values())
    assert study.best_trial.number == result.best.number


@pytest.mark.usefixtures("figures")
def test_failed_trials_are_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    result = search(tmp_path, max_trials=6, scan=False).fit(toy(trap="raise"), **loaders())
    failed = [t for t in result.trials if t.state == "failed"]
    assert failed and all("the toy was told to break" in t.message for t in failed)
    assert len({t.values["density"] for t in result.trials}) == 6
    assert result.best is not None and result.best.values["density"] >= 0.5
    assert "told to break" in (failed[0].directory / "error.txt").read_text()


@pytest.mark.usefixtures("figures")
def test_nothing_feasible_is_said_with_the_nearest_miss(tmp_path: Path) -> None:
    low = Prune(Range(0.005, 0.03, log=True))
    result = search(tmp_path, scheme=low, max_trials=3).fit(toy(), **loaders())
    assert result.best is None
    miss = result.nearest_miss
    assert miss is not None and miss.metric == max(t.metric for t in result.trials)
    assert "No trial is feasible" in result.summary()
    assert f"trial {miss.number}" in result.summary()
    result.save(tmp_path / "out")
    assert not (tmp_path / "out" / "best.condensa").exists()


def test_resuming_repeats_nothing_and_may_change_tolerance_and_budget(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    model = toy(journal=journal)
    first = search(tmp_path, max_trials=3).fit(model, **loaders())
    assert len(journal.read_text().splitlines()) == 3
    second = search(tmp_path, max_trials=5, tolerance=0.2).fit(model, **loaders())
    assert len(journal.read_text().splitlines()) == 5
    assert second.trials[:3] != () and [t.values for t in second.trials[:3]] == [
        t.values for t in first.trials
    ]
    assert second.level == pytest.approx(0.75)


def test_resumed_search_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    search(tmp_path / "a", max_trials=2).fit(toy(), **loaders())
    resumed = search(tmp_path / "a", max_trials=5).fit(toy(), **loaders())
    straight = search(tmp_path / "b", max_trials=5).fit(toy(), **loaders())
    assert [t.values for t in resumed.trials] == [t.values for t in straight.trials]
    assert [t.metric for t in resumed.trials] == [t.metric for t in straight.trials]


KILLED = """
import os, sys
from pathlib import Path
from toy import Toy, loaders, search, toy

class Killed(Toy):
    def on_train_end(self):
        if len(self.journal.read_text().splitlines()) == 4:
            Path(os.environ["READY"]).touch()
            import time; time.sleep(60)

import torch
torch.set_num_threads(1)
torch.manual_seed(0)
search(Path(sys.argv[1])).fit(Killed(journal=Path(sys.argv[2])), **loaders())
"""


@pytest.mark.slow
def test_kill_minus_nine_in_trial_four_loses_nothing_finished(tmp_path: Path) -> None:
    journal, ready = tmp_path / "journal", tmp_path / "ready"
    environment = {**os.environ, "READY": str(ready), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(journal)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not ready.exists() and time.monotonic() < deadline:
            assert process.poll() is None, "the search ended before it could be killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert len(journal.read_text().splitlines()) == 4
    result = search(tmp_path / "run").fit(toy(journal=journal), **loaders())
    # Three had finished; the fourth is run again, then the last two.
    assert len(journal.read_text().splitlines()) == 4 + 3
    assert len(result.trials) == 6
    straight = search(tmp_path / "straight").fit(toy(), **loaders())
    assert [t.values for t in result.trials] == [t.values for t in straight.trials]
    assert result.best.values == straight.best.values


def test_another_search_in_the_same_study_is_refused(tmp_path: Path) -> None:
    search(tmp_path, max_trials=1).fit(toy(), **loaders())
    with pytest.raises(ValueError, match=r"another search.*metric.*val_acc.*val_loss"):
        search(tmp_path, metric="val_loss", mode="min").fit(toy(), **loaders())
    other = toy()
    nn.init.ones_(other.layer.weight)
    with pytest.raises(ValueError, match="starting weights"):
        search(tmp_path).fit(other, **loaders())


def test_trials_in_a_spawned_process_pool(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        inside = search(tmp_path / "pool", max_trials=3, executor=pool).fit(toy(), **loaders())
    here = search(tmp_path / "here", max_trials=3).fit(toy(), **loaders())
    assert [t.state for t in inside.trials] == [t.state for t in here.trials]
    assert [t.metric for t in inside.trials] == [t.metric for t in here.trials]
    assert [t.values for t in inside.trials] == [t.values for t in here.trials]


def test_confidence_demands_a_margin(tmp_path: Path) -> None:
    sure = search(tmp_path, confidence=0.95, metric_std=0.01).fit(toy(), **loaders())
    assert sure.target == pytest.approx(0.90 + 1.645 * 0.01, abs=1e-4)
    assert sure.best.metric >= sure.target > sure.level


def test_one_trial_for_each_realizable_structure(tmp_path: Path) -> None:
    class Filters(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 4, 3)

        def training_step(self, batch, batch_idx):
            return self.conv(batch[0].unsqueeze(1)).square().mean()

    scheme = FilterPrune(Range(0.25, 1.0))
    result = search(tmp_path, scheme=scheme, objective=Parameters()).fit(Filters(), **loaders())
    kept = [round(4 * t.values["density"]) for t in result.trials]
    assert sorted(kept) == [1, 2, 3, 4]


@pytest.mark.usefixtures("figures")
def test_tensorboard_has_every_trial_and_an_overview(tmp_path: Path) -> None:
    result = search(tmp_path, max_trials=2).fit(toy(), **loaders())
    overview = EventAccumulator(str(tmp_path / "overview"), size_guidance={"images": 0}).Reload()
    tags = overview.Tags()
    assert {"search/val_acc", "search/objective"} <= set(tags["scalars"])
    assert {"search/metric", "search/trace"} <= set(tags["images"])
    logged = [e.value for e in overview.Scalars("search/val_acc")]
    assert logged == pytest.approx([t.metric for t in result.trials])
    for trial in result.trials:
        tags = EventAccumulator(str(trial.directory)).Reload().Tags()["scalars"]
        assert {"condensa/density", "condensa/gap", "condensa/rate"} <= set(tags)
        assert "condensa/layer_density/layer.weight" in tags


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tolerance": -0.1}, r"tolerance must be .* >= 0, got -0.1"),
        ({"tolerance": math.nan}, "tolerance must be"),
        ({"max_trials": 0}, "max_trials must be an int >= 1, got 0"),
        ({"mode": "best"}, "mode must be 'min' or 'max', got 'best'"),
        ({"method": "magic"}, "must be one of"),
        ({"confidence": 1.5}, r"confidence must be in \[0.5, 1\), got 1.5"),
        ({"metric_std": -1}, "metric_std must be"),
        ({"scheme": Prune(0.5)}, "nothing to search"),
        ({"scheme": 0.5}, "scheme must be a scheme"),
        ({"objective": 5}, "objective must be"),
        ({"objective": lambda compressed: 1.0}, "direction='min' or direction='max'"),
        ({"objective": MemoryFootprint(), "direction": "max"}, "contradicts"),
    ],
)
def test_bad_arguments_are_refused_when_built(tmp_path: Path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        search(tmp_path, **changes)


def refused(searching: CondensaSearch, model: object, **data: object) -> str:
    with pytest.raises(ValueError) as caught:
        searching.fit(model, **data)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_models_data_and_metrics_are_refused_before_training(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    model = toy(journal=journal)
    assert "must be a LightningModule, got Linear" in refused(
        search(tmp_path / "1"), nn.Linear(2, 2), **loaders()
    )
    unknown = refused(search(tmp_path / "2", metric="accuracy"), model, **loaders())
    assert "metric='accuracy' is not logged" in unknown and "val_acc" in unknown
    assert "needs a datamodule, or" in refused(search(tmp_path / "3"), model)
    nowhere = Prune(Range(0.1, 1.0), include="decoder")
    assert "matches no weight" in refused(
        search(tmp_path / "4", scheme=nowhere), model, **loaders()
    )
    tiny = Prune(Range(1e-6, 1.0, log=True))
    assert "keeps 0 of 4000" in refused(search(tmp_path / "5", scheme=tiny), model, **loaders())

    def broken(compressed):
        return math.nan

    assert "finite number" in refused(
        search(tmp_path / "6", objective=broken, direction="min"), model, **loaders()
    )
    assert not journal.exists()


def test_pareto_front_has_no_dominated_trial(tmp_path: Path) -> None:
    result: SearchResult = search(tmp_path, max_trials=5).fit(toy(), **loaders())
    front = result.pareto
    assert front and all(a in result.trials for a in front)
    for a in front:
        better = (
            t
            for t in result.trials
            if t.metric >= a.metric
            and t.objective <= a.objective
            and (t.metric, t.objective) != (a.metric, a.objective)
        )
        assert next(better, None) is None


def test_a_strategy_that_restarts_the_script_is_refused(tmp_path: Path) -> None:
    two = {"max_epochs": 1, "accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    with pytest.raises(ValueError, match="strategy='ddp_spawn' or one device"):
        search(tmp_path, trainer=two).fit(toy(), **loaders())


@pytest.mark.slow
def test_trials_on_two_spawned_processes(tmp_path: Path) -> None:
    two = {"max_epochs": 2, "accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn"}
    result = search(tmp_path, max_trials=2, trainer=two).fit(toy(), **loaders())
    assert [t.state for t in result.trials] == ["feasible", "infeasible"]
    loaded = result.best.load(Toy())
    kept = round(result.best.values["density"] * loaded.layer.weight.numel())
    assert int(torch.count_nonzero(loaded.layer.weight)) == kept


class Timed(Objective):
    """Would run beside the dense model."""

    def __init__(self, told: tuple[int, float] | None = None) -> None:
        self.told = told

    def __call__(self, compressed: CompressedModel) -> float:
        return MemoryFootprint()(compressed)

    def details(self, compressed: CompressedModel) -> dict[str, Any]:
        return {"value": self(compressed), "told": self.told}

    def beside(self, dense: nn.Module, values: Mapping[str, float]) -> Timed:
        nonzeros = int(torch.count_nonzero(dense.get_parameter("layer.weight")))
        return Timed((nonzeros, values[self.name]))


def test_trials_measure_beside_the_dense_model(tmp_path: Path) -> None:
    result = search(tmp_path, objective=Timed(), max_trials=2).fit(toy(), **loaders())
    assert [t.details["told"] for t in result.trials] == [[4000, result.baseline.objective]] * 2


def test_an_objective_that_no_value_improves_is_said_before_training(tmp_path: Path) -> None:
    def depth(compressed: CompressedModel) -> float:
        return float(len(list(compressed.module.modules())))

    with pytest.warns(UserWarning, match="no value of the scheme makes the depth more than 1%"):
        search(tmp_path, objective=depth, direction="min", max_trials=1).fit(toy(), **loaders())
