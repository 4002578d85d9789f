"""One contract for everything that trials can run on, each on a real local cluster."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from toy import loaders, search, toy

from lightning_condensa.search import DaskExecutor, ProcessPool, RayExecutor, SubmititExecutor
from lightning_condensa.search.executors import InProcess, WorkerLostError
from lightning_condensa.testing import EXECUTOR_LAWS, check_executor

Make = Callable[[], Executor]
NEEDS = {"dask": "distributed", "ray": "ray", "submitit": "submitit"}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("standard", *NEEDS)]


def _dask(stack: ExitStack) -> Make:
    import dask
    from distributed import Client, LocalCluster

    # Dask would try a task that kills its worker three more times.
    stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": 0}))
    cluster = stack.enter_context(
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    )
    client = stack.enter_context(Client(cluster))
    return lambda: DaskExecutor(client)


def _ray(stack: ExitStack) -> Make:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    stack.callback(ray.shutdown)
    return RayExecutor


def _submitit(stack: ExitStack) -> Make:
    import submitit

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    return lambda: SubmititExecutor(submitit.LocalExecutor(folder), workers=2, poll=0.1)


@pytest.fixture(scope="module")
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes executors of a kind, on a cluster that all tests of the kind share."""
    kind = request.param
    if kind in NEEDS and importlib.util.find_spec(NEEDS[kind]) is None:
        pytest.skip(f"{NEEDS[kind]} is not installed: pip install '.[distributed]'")
    with ExitStack() as stack:
        # Workers import this test's modules by name.
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        stack.callback(_restore, before)
        kinds: dict[str, Callable[[], Make]] = {
            "in process": lambda: InProcess,
            "pool": lambda: lambda: ProcessPool(2, threads=1),
            "standard": lambda: lambda: ProcessPoolExecutor(2, mp_context=get_context("spawn")),
            "dask": lambda: _dask(stack),
            "ray": lambda: _ray(stack),
            "submitit": lambda: _submitit(stack),
        }
        yield kinds[kind]()


def _restore(before: str | None) -> None:
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


KINDS = ["in process", pytest.param("pool", marks=pytest.mark.slow), *SLOW]


@pytest.mark.parametrize("make", KINDS, indirect=True, scope="module")
@pytest.mark.parametrize("law", EXECUTOR_LAWS)
def test_laws(make: Make, law: str) -> None:
    check_executor(make, law)


@pytest.mark.parametrize("make", KINDS, indirect=True, scope="module")
def test_a_search_finds_the_same_as_in_this_process(make: Make, tmp_path: Path) -> None:
    with make() as executor:
        there = search(tmp_path / "there", max_trials=3, executor=executor, parallel=1)
        found = there.fit(toy(), **loaders())
    here = search(tmp_path / "here", max_trials=3).fit(toy(), **loaders())
    assert [(t.values, t.metric, t.objective, t.state) for t in found.trials] == [
        (t.values, t.metric, t.objective, t.state) for t in here.trials
    ]


def test_unknown_law_is_refused() -> None:
    with pytest.raises(ValueError, match="law must be one of"):
        check_executor(InProcess, "sings")


def _threads_and_gpus() -> tuple[int, str | None, str | None]:
    time.sleep(1.0)
    environment = os.environ
    return (
        torch.get_num_threads(),
        environment.get("OMP_NUM_THREADS"),
        environment.get("CUDA_VISIBLE_DEVICES"),
    )


class _AwkwardError(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(a + b)


def _awkward() -> None:
    raise _AwkwardError(1, 2)


def test_pool_pins_threads_and_devices_and_survives_everything() -> None:
    with ProcessPool(2, threads=3, gpus=["5", "MIG-7"]) as pool:
        seen = [f.result(60) for f in [pool.submit(_threads_and_gpus) for _ in range(2)]]
        assert sorted(seen) == [(3, "3", "5"), (3, "3", "MIG-7")]
        with pytest.raises(AttributeError, match="local object"):
            pool.submit(lambda: None)
        with pytest.raises(SystemExit):
            pool.submit(sys.exit, 3).result(60)
        error = pool.submit(_awkward).exception(60)
        assert "_AwkwardError: 3" in str(error) and "_awkward" in str(error.__cause__)
        running = [pool.submit(time.sleep, 60) for _ in range(3)]
        time.sleep(0.5)
        began = time.monotonic()
        pool.terminate_workers()
        assert isinstance(running[0].exception(20), WorkerLostError)
        assert "signal 9" in str(running[1].exception(20))
        assert running[2].cancelled()
        assert time.monotonic() - began < 20
        assert pool.submit(divmod, 7, 2).result(60) == (3, 1)
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(divmod, 7, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"workers": 0}, "workers must be an int >= 1, got 0"), ({"workers": 1, "threads": 0}, "th")],
)
def test_bad_pools_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProcessPool(**arguments)


ORPHANS = """
import os, sys, time
from lightning_condensa.search import ProcessPool
if __name__ == "__main__":
    pool = ProcessPool(1)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    if sys.argv[1] == "die":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["die", "exit"])
def test_workers_end_with_their_parent(how: str, tmp_path: Path) -> None:
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(
        [sys.executable, str(script), how],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    worker = Path(f"/proc/{int(process.stdout)}")
    deadline = time.monotonic() + 20
    while worker.exists() and "Z" not in (worker / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.1)
