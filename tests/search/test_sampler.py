"""Our strategies in studies of Optuna's, on the storages that it has."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
import pytest
import pytorch_lightning as pl
import torch
from optuna.trial import TrialState
from servers import postgres, postgres_folder
from torch import nn
from toy import CLIFF, loaders, search, toy

from lightning_condensa import FilterPrune, Parameters, Prune, Range
from lightning_condensa.deploy import CompressedModel
from lightning_condensa.search import CondensaSampler

DENSITY = Prune(Range(0.005, 1.0, log=True))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def accuracy(compressed: CompressedModel) -> float:
    """The toy's, as Lightning logs it."""
    weight = compressed.module.layer.weight
    density = float(torch.count_nonzero(weight)) / weight.numel()
    drop = 0.5 * min(max(math.log(CLIFF / density), 0.0), 1.0)
    return float(torch.tensor(0.95 - drop))


def task(sampler: CondensaSampler) -> Any:
    model = toy()

    def objective(trial: optuna.Trial) -> float:
        compressed = CompressedModel.compress(model, sampler.suggest(trial))
        return sampler.report(trial, compressed, metric=accuracy(compressed))

    return objective


def sampler(**changes: Any) -> CondensaSampler:
    dense = float(torch.tensor(0.95))
    arguments: dict[str, Any] = {"baseline": dense, "tolerance": 0.05, "samples": 1000}
    return CondensaSampler(DENSITY, toy(), Parameters(), **{**arguments, **changes})


def test_the_sampler_proposes_what_the_search_does(tmp_path: Path) -> None:
    ours = sampler()
    study = optuna.create_study(sampler=ours)
    study.optimize(task(ours), n_trials=6)
    alike: dict[str, Any] = {"scan": False, "warm_start": 0}  # a sampler has no data, nor models
    task_of_ours = search(tmp_path, max_trials=6, objective=Parameters(), **alike)
    result = task_of_ours.fit(toy(), **loaders())
    assert [t.params for t in study.trials] == [t.values for t in result.trials]
    assert study.best_trial.params == result.best.values
    assert [t.constraints["metric"] <= 0 for t in study.trials] == [
        t.state == "feasible" for t in result.trials
    ]


def test_diverged_and_failed_trials_and_those_of_others_are_taken_into_account() -> None:
    ours = sampler()

    def objective(trial: optuna.Trial) -> float:
        compressed = CompressedModel.compress(toy(), ours.suggest(trial))
        density = trial.params["density"]
        if density < 0.05:
            return ours.report(trial, compressed, metric=math.nan)
        if density < 0.1:
            raise RuntimeError("no luck")
        return ours.report(trial, compressed, metric=0.95)

    study = optuna.create_study(sampler=ours)
    study.optimize(objective, n_trials=8, catch=RuntimeError)
    assert len({t.params["density"] for t in study.trials}) == 8
    assert study.best_trial.params["density"] >= 0.1
    mine, theirs = study.ask(), study.ask()  # at the same time
    assert ours.suggest(mine) != ours.suggest(theirs)


def test_the_study_stops_when_nothing_is_left() -> None:
    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 4, 3)

    ours = CondensaSampler(FilterPrune(Range(0.25, 1.0)), Net(), Parameters(), 0.9, 0.1)

    def objective(trial: optuna.Trial) -> float:
        compressed = CompressedModel.compress(Net(), ours.suggest(trial))
        return ours.report(trial, compressed, metric=0.9)

    study = optuna.create_study(sampler=ours)
    study.optimize(objective, n_trials=20)
    assert sorted(round(4 * t.params["density"]) for t in study.trials) == [1, 2, 3, 4]


def test_bad_samplers_are_refused() -> None:
    for changes, message in (
        ({"tolerance": -1.0}, "tolerance must be a finite number >= 0, got -1.0"),
        ({"baseline": math.nan}, "baseline must be a finite number"),
        ({"mode": "up"}, "mode must be"),
        ({"confidence": 2.0}, "confidence must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler(**changes)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    if postgres_folder() is None:
        pytest.skip("PostgreSQL is not installed: no pg_ctl")
    if find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed: pip install '.[distributed]'")
    with postgres() as address:
        yield address


@pytest.fixture(params=["sqlite", pytest.param("journal", marks=pytest.mark.slow), "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("server"))
    return {
        "sqlite": f"sqlite:///{tmp_path}/x.db",
        "journal": f"journal:///{tmp_path}/x.log",
    }[request.param]


def test_a_search_resumes_on_every_storage(storage: str, tmp_path: Path) -> None:
    arguments = {"storage": storage, "study_name": "resumed"}
    search(tmp_path / "a", max_trials=2, **arguments).fit(toy(), **loaders())
    resumed = search(tmp_path / "a", max_trials=4, **arguments).fit(toy(), **loaders())
    straight = search(tmp_path / "b", max_trials=4).fit(toy(), **loaders())
    assert [(t.values, t.metric, t.objective, t.state) for t in resumed.trials] == [
        (t.values, t.metric, t.objective, t.state) for t in straight.trials
    ]


HEARTBEAT = """
import os, sys
import optuna
from test_sampler import sampler, task
ours = sampler()
storage = optuna.storages.RDBStorage(sys.argv[1], heartbeat_interval=1, grace_period=2)
study = optuna.load_study(study_name="beating", storage=storage, sampler=ours)
def objective(trial):
    value = task(ours)(trial)
    if trial.number == 1:
        os.kill(os.getpid(), 9)
    return value
study.optimize(objective, n_trials=3)
"""


@pytest.mark.slow
def test_a_killed_process_is_noticed_by_its_heartbeat(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/x.db"
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=1)
    storage = optuna.storages.RDBStorage(
        address, heartbeat_interval=1, grace_period=2, heartbeat_stale_trial_callback=retry
    )
    ours = sampler()
    study = optuna.create_study(study_name="beating", storage=storage, sampler=ours)
    environment = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", HEARTBEAT, address], env=environment, timeout=200)
    time.sleep(3)
    study.optimize(task(ours), n_trials=2)
    states = [t.state for t in study.trials]
    assert states[:2] == [TrialState.COMPLETE, TrialState.FAIL]
    assert study.trials[2].params == study.trials[1].params
    assert states[2:] == [TrialState.COMPLETE] * 2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("optuna_dashboard") is None, reason="optuna-dashboard is missing")
def test_the_dashboard_shows_objective_and_constraint(tmp_path: Path) -> None:
    result = search(tmp_path, max_trials=4).fit(toy(), **loaders())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "optuna-dashboard"
    command = [str(program), f"sqlite:///{tmp_path}/study.db", "--port", str(port)]
    with ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        stack.callback(server.kill)
        (study,) = _get(port, "studies", server)["study_summaries"]
        detail = _get(port, f"studies/{study['study_id']}?after=0", server)
    shown = {t["number"]: t for t in detail["trials"]}
    assert study["study_name"] == "condensa" and len(shown) == 4
    for trial in result.trials:
        there = shown[trial.number]
        assert there["values"] == [trial.objective]
        assert (there["constraints"][0] <= 0) == (trial.state == "feasible")
        assert float(there["params"][0]["param_external_value"]) == trial.values["density"]


def _get(port: int, path: str, server: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + 120
    while True:
        try:
            url = f"http://127.0.0.1:{port}/api/{path}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
