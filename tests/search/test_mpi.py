"""The contract of executors, and what may die, in jobs of a real ``mpiexec``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
from toy import loaders, search, toy

from lightning_condensa.search import MPIExecutor

MISSING = [
    name
    for name, found in (
        ("mpiexec", which("mpiexec")),
        ("mpi4py (pip install mpi4py)", importlib.util.find_spec("mpi4py")),
    )
    if found is None
]
needs_mpi = pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)}")

LAWS = """
import sys
from pathlib import Path
from toy import loaders, search, toy
from lightning_condensa.search import MPIExecutor
from lightning_condensa.search.trial import make_trainer
from lightning_condensa.testing import EXECUTOR_LAWS, check_executor

if __name__ == "__main__":
    # Would wait for the workers if it took them for processes of its own training.
    two = {"devices": 2, "strategy": "ddp_spawn", "accelerator": "cpu"}
    assert make_trainer(two, Path(sys.argv[1])).world_size == 2
    for law in EXECUTOR_LAWS:
        if law != "survives a dead worker":  # MPI does not
            check_executor(MPIExecutor, law)
    with MPIExecutor() as executor:
        assert executor.workers == 2
        task = search(Path(sys.argv[1]), max_trials=3, executor=executor, parallel=1)
        for trial in task.fit(toy(), **loaders()).trials:
            print("found", trial.values["density"], trial.metric, trial.objective, trial.state)
"""

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from toy import Toy, loaders, search
from lightning_condensa.search import MPIExecutor

class Killer(Toy):
    def on_fit_start(self):
        super().on_fit_start()
        if len(self.journal.read_text().splitlines()) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    torch.manual_seed(0)
    module = Killer(journal=Path(sys.argv[2]))
    with MPIExecutor() as executor:
        task = search(Path(sys.argv[1]), max_trials=5, executor=executor)
        for trial in task.fit(module, **loaders()).trials:
            print("trial", trial.number, trial.state)
"""


def mpiexec(
    processes: int, script: Path, *arguments: object, module: bool = True
) -> subprocess.CompletedProcess[str]:
    own = {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
        # Open MPI, by its age: as root, in containers, on few cores.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    through = ["-m", "mpi4py.futures"] if module else []
    return subprocess.run(
        ["mpiexec", "-n", str(processes), sys.executable, *through, script, *map(str, arguments)],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=280,
    )


def lines(process: subprocess.CompletedProcess[str], word: str) -> list[list[str]]:
    found = [line.split() for line in process.stdout.splitlines()]
    return [line[1:] for line in found if line[:1] == [word]]


@needs_mpi
@pytest.mark.slow
def test_laws_and_a_search(tmp_path: Path) -> None:
    script = tmp_path / "laws.py"
    script.write_text(LAWS)
    process = mpiexec(3, script, tmp_path / "there")
    assert process.returncode == 0, process.stdout + process.stderr
    here = search(tmp_path / "here", max_trials=3).fit(toy(), **loaders())
    assert lines(process, "found") == [
        [str(t.values["density"]), str(t.metric), str(t.objective), t.state] for t in here.trials
    ]


@needs_mpi
@pytest.mark.slow
def test_a_killed_worker_ends_the_job_and_the_next_one_goes_on(tmp_path: Path) -> None:
    script, journal = tmp_path / "killed.py", tmp_path / "journal"
    script.write_text(KILLED)
    process = mpiexec(3, script, tmp_path / "run", journal)
    assert process.returncode != 0 and not lines(process, "trial")
    finished = len([*(tmp_path / "run" / "trials").glob("*/trial.json")])
    begun = len(journal.read_text().splitlines())
    process = mpiexec(3, script, tmp_path / "run", journal)
    assert process.returncode == 0, process.stdout + process.stderr
    trials = lines(process, "trial")
    assert len(trials) == len({number for number, _ in trials}) == 5
    assert {state for _, state in trials} <= {"feasible", "infeasible"}
    assert len(journal.read_text().splitlines()) == begun + 5 - finished


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(("processes", "module"), [(1, True), (2, False)])
def test_a_job_without_workers_is_refused(tmp_path: Path, processes: int, module: bool) -> None:
    script = tmp_path / "alone.py"
    script.write_text(
        "from lightning_condensa.search import MPIExecutor\n"
        "if __name__ == '__main__':\n"
        "    MPIExecutor()\n"
    )
    process = mpiexec(processes, script, module=module)
    assert process.returncode != 0
    assert f"this is one of {processes} process(es)" in process.stderr, process.stderr


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delitem(sys.modules, "mpi4py.futures", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pip install mpi4py"):
        MPIExecutor()


def test_bad_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers must be an int >= 1, got 0"):
        MPIExecutor(0)
