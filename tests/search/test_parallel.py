"""Trials in flight: what is proposed, lost, retried, interrupted and taken up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from filelock import FileLock
from toy import Toy, loaders, search, toy

from lightning_condensa.search import DaskExecutor, ProcessPool
from lightning_condensa.search.executors import InProcess, WorkerLostError
from lightning_condensa.search.trial import TrialJob


class Late(Executor):
    """Runs tasks in this process, but ends them in an order of its own, or loses them.

    Args:
        lose: Whether to lose the n-th task of a trial.
    """

    workers = 3

    def __init__(self, lose: Callable[[TrialJob, int], bool] = lambda job, n: False) -> None:
        self.lose, self.tries, self.most = lose, {}, 0
        self.waiting: list[tuple[Future[Any], Any, TrialJob]] = []

    def submit(self, fn: Any, /, job: TrialJob) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        self.waiting.append((future, fn, job))
        self.most = max(self.most, len(self.waiting))
        if len(self.waiting) == self.workers or job.number >= 3:
            self._end()
        return future

    def _end(self) -> None:
        """End everything, the last one first."""
        while self.waiting:
            future, fn, job = self.waiting.pop()
            self.tries[job.number] = self.tries.get(job.number, 0) + 1
            if self.lose(job, self.tries[job.number]):
                future.set_exception(WorkerLostError("the worker was told to die"))
            else:
                future.set_result(fn(job))


def study(directory: Path) -> optuna.Study:
    return optuna.load_study(study_name="condensa", storage=f"sqlite:///{directory}/study.db")


@pytest.mark.slow
def test_pending_trials_are_told_to_the_strategy_and_the_budget_is_kept(tmp_path: Path) -> None:
    executor = Late()
    result = search(tmp_path, executor=executor, max_trials=7).fit(toy(), **loaders())
    assert executor.most == 3
    assert [t.number for t in result.trials] == list(range(7))
    assert len({t.values["density"] for t in result.trials}) == 7
    again = search(tmp_path / "again", executor=Late(), max_trials=7).fit(toy(), **loaders())
    assert [t.values for t in again.trials] == [t.values for t in result.trials]


def test_a_lost_trial_is_run_once_more_and_counts_once(tmp_path: Path) -> None:
    executor = Late(lambda job, tried: job.number in (0, 4) and tried == 1)
    result = search(tmp_path / "a", executor=executor, max_trials=6).fit(toy(), **loaders())
    assert len(result.trials) == 6 and {t.state for t in result.trials} <= {
        "feasible",
        "infeasible",
    }
    assert executor.tries[0] == executor.tries[4] == 2
    assert len(study(tmp_path / "a").trials) == 6


@pytest.mark.slow
def test_a_trial_lost_twice_is_recorded_as_failed(tmp_path: Path) -> None:
    executor = Late(lambda job, tried: job.number == 4)
    result = search(tmp_path, executor=executor, max_trials=6).fit(toy(), **loaders())
    (failed,) = [t for t in result.trials if t.state == "failed"]
    assert failed.number == 4 and "WorkerLostError: the worker was told to die" in failed.message
    assert executor.tries[4] == 2
    assert len({t.values["density"] for t in result.trials}) == 6


def test_an_executor_that_runs_nothing_is_reported_at_once(tmp_path: Path) -> None:
    executor = Late(lambda job, tried: True)
    with pytest.raises(RuntimeError, match=r"Late could not run any trial: WorkerLostError"):
        search(tmp_path, executor=executor).fit(toy(), **loaders())
    result = search(tmp_path, max_trials=4).fit(toy(), **loaders())  # nothing was used up
    assert [t.state == "failed" for t in result.trials] == [False] * 4


class Hungry(Toy):
    """Runs out of memory in its first fits, as many as the number in the journal says."""

    def on_fit_start(self) -> None:
        left = int(self.journal.read_text())
        if left:
            self.journal.write_text(str(left - 1))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize(("times", "state"), [(1, "feasible"), (2, "failed")])
def test_a_lack_of_memory_is_tried_again_once(tmp_path: Path, times: int, state: str) -> None:
    journal = tmp_path / "left"
    journal.write_text(str(times))
    torch.manual_seed(0)
    hungry = Hungry(journal=journal)
    result = search(tmp_path, max_trials=2, scan=False).fit(hungry, **loaders())
    assert result.trials[0].state == state
    assert result.trials[1].state != "failed"
    assert len(study(tmp_path).trials) == 2


class Killer(Toy):
    """Kills its process in the first fit."""

    def on_fit_start(self) -> None:
        if not self.journal.exists():
            self.journal.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def _standard() -> Executor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pool", "made again"])
def test_a_killed_worker_costs_no_trial(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    module = Killer(journal=tmp_path / "killed")
    executor: Any = ProcessPool(1, threads=1) if kind == "pool" else _standard
    result = search(tmp_path / kind, max_trials=2, executor=executor).fit(module, **loaders())
    assert module.journal.exists()
    assert [t.number for t in result.trials] == [0, 1]
    undisturbed = search(tmp_path / "here", max_trials=2).fit(module, **loaders())
    assert [(t.values, t.metric, t.state) for t in result.trials] == [
        (t.values, t.metric, t.state) for t in undisturbed.trials
    ]
    assert {t.state for t in result.trials} <= {"feasible", "infeasible"}
    if kind == "pool":
        executor.shutdown()


@pytest.mark.slow
def test_a_broken_pool_that_cannot_be_made_again_is_explained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Killer(journal=tmp_path / "killed")
    with _standard() as pool, pytest.raises(RuntimeError, match=r"ProcessPool\(…\)"):
        search(tmp_path, max_trials=2, executor=pool).fit(module, **loaders())


INTERRUPTED = """
import os, sys, time
from pathlib import Path
from toy import Toy, loaders, search
import torch
from lightning_condensa.search import DaskExecutor, ProcessPool

class Slow(Toy):
    def on_fit_start(self):
        with self.journal.open("a") as file:
            file.write("fit\\n")
        if len(self.journal.read_text().splitlines()) > 2:
            time.sleep(600)

if __name__ == "__main__":
    torch.manual_seed(0)
    with ProcessPool(2, threads=1) as pool:
        task = search(Path(sys.argv[1]), executor=pool)
        task.fit(Slow(journal=Path(sys.argv[2])), **loaders())
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_search_and_its_workers(tmp_path: Path) -> None:
    script, journal = tmp_path / "interrupted.py", tmp_path / "journal"
    script.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run"), str(journal)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not journal.exists() or len(journal.read_text().splitlines()) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
    result = search(tmp_path / "run").fit(toy(), **loaders())
    assert len(result.trials) == 6 and {t.state for t in result.trials} <= {
        "feasible",
        "infeasible",
    }
    lost = [t for t in study(tmp_path / "run").trials if t.user_attrs["status"] == "lost"]
    assert len(lost) == 2


def test_a_trial_that_ended_while_nobody_listened_is_taken_up(tmp_path: Path) -> None:
    class Stopped(InProcess):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            future = super().submit(fn, *args, **kwargs)
            if args[0].number == 2:  # as if the driver died now
                raise KeyboardInterrupt
            return future

    journal = tmp_path / "journal"
    model = toy(journal=journal)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "a", executor=Stopped()).fit(model, **loaders())
    result = search(tmp_path / "a", max_trials=4).fit(model, **loaders())
    assert [t.number for t in result.trials] == [0, 1, 2, 3]
    assert len(journal.read_text().splitlines()) == 4
    # The record of another study's trial, in the same place, is not taken for this one's.
    (tmp_path / "a" / "study.db").unlink()
    search(tmp_path / "a", max_trials=2).fit(model, **loaders())
    assert len(journal.read_text().splitlines()) == 6


def test_two_drivers_do_not_share_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_condensa.search.condensa_search._LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / ".lock"), pytest.raises(RuntimeError, match="another search is run"):
        search(tmp_path).fit(toy(), **loaders())
    search(tmp_path, max_trials=1).fit(toy(), **loaders())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": 0, "executor": InProcess()}, "parallel must be an int >= 1, got 0"),
        ({"parallel": 2}, r"parallel=2 needs an executor, such as ProcessPool\(2\)"),
        ({"executor": 4}, "executor must be a concurrent.futures.Executor or a function"),
    ],
)
def test_bad_arguments(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(tmp_path, **changes)


def _dask(stack: ExitStack) -> Executor:
    distributed = pytest.importorskip("distributed")
    options = {"threads_per_worker": 1, "processes": True, "dashboard_address": None}
    cluster = stack.enter_context(distributed.LocalCluster(n_workers=1, **options))
    return DaskExecutor(stack.enter_context(distributed.Client(cluster)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pool", "dask"])
def test_two_processes_of_ddp_in_a_worker(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    two = {"max_epochs": 1, "accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn"}
    with ExitStack() as stack:
        pool = _dask(stack) if kind == "dask" else ProcessPool(1, threads=1)
        stack.enter_context(pool)
        task = search(tmp_path, max_trials=1, trainer=two, executor=pool, scan=False)
        result = task.fit(toy(), **loaders())
    assert [(t.state, t.message) for t in result.trials] == [("feasible", "")]
    loaded = result.best.load(Toy())
    kept = round(result.best.values["density"] * loaded.layer.weight.numel())
    assert int(torch.count_nonzero(loaded.layer.weight)) == kept


def _note_and_sleep(rank: int, journal: Path) -> None:
    with journal.open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(600)


def _two_processes(journal: Path) -> None:
    torch.multiprocessing.spawn(_note_and_sleep, (journal,), nprocs=2)


def _runs(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["terminated", "killed"])
def test_children_of_a_worker_end_with_it(how: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with ProcessPool(1, threads=1) as pool:
        worker = pool.submit(os.getpid).result(120)
        future = pool.submit(_two_processes, journal)
        deadline = time.monotonic() + 120
        while not journal.exists() or len(journal.read_text().splitlines()) < 2:
            assert not future.done() and time.monotonic() < deadline
            time.sleep(0.1)
        children = [int(line) for line in journal.read_text().splitlines()]
        assert all(map(_runs, children))
        if how == "killed":
            os.kill(worker, signal.SIGKILL)
        else:
            pool.terminate_workers()
        assert isinstance(future.exception(20), WorkerLostError)
        deadline = time.monotonic() + 20
        while any(map(_runs, children)):
            assert time.monotonic() < deadline, "the worker's children outlived it"
            time.sleep(0.1)
