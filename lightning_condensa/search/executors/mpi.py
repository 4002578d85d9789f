"""Trials on the processes of an MPI job."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from lightning_condensa.search.executors.base import require


class MPIExecutor(Executor):
    """Runs tasks on MPI processes through ``mpi4py.futures``, one per process at a time.

    The first process of ``mpiexec -n 5 python -m mpi4py.futures script.py`` runs the script, the
    others are the workers. They import the script, which needs ``if __name__ == "__main__":``. A
    script that is started by itself spawns ``workers`` of them, where MPI lets it.

    MPI knows no way to stop a process, or to go on without one: a task that runs cannot be
    cancelled, and when a process dies, ``mpiexec`` ends the whole job. Submit such a job again, and
    the search goes on with what it has in its study.

    Args:
        workers: Processes to spawn; under ``mpiexec`` all but the first are workers.
        **options: Of ``mpi4py.futures.MPIPoolExecutor``.

    Raises:
        ModuleNotFoundError: Without ``mpi4py``.
        RuntimeError: If the script was started such that it has no workers, or runs several times.
        ValueError: If ``workers`` is below 1.

    Example:
        >>> executor = MPIExecutor()  # doctest: +SKIP
    """

    def __init__(self, workers: int | None = None, **options: Any) -> None:
        if workers is not None and (not isinstance(workers, int) or workers < 1):
            raise ValueError(f"workers must be an int >= 1, got {workers!r}")
        futures = require("mpi4py.futures", "mpi4py and an MPI library", install="mpi4py")
        processes = require("mpi4py.MPI", "mpi4py", install="mpi4py").COMM_WORLD.Get_size()
        teamed = any(argument.endswith("mpi4py.futures") for argument in sys.orig_argv)
        if teamed != (processes > 1):
            raise RuntimeError(
                "MPIExecutor needs a process for the script and at least one more: start it with "
                "mpiexec -n 3 python -m mpi4py.futures SCRIPT.py, or by itself to spawn workers; "
                f"this is one of {processes} process(es)"
                f"{'' if teamed else ', without -m mpi4py.futures'}"
            )
        self._executor = futures.MPIPoolExecutor(workers, **options)

    @property
    def workers(self) -> int:
        """The processes beside this one."""
        return int(self._executor.num_workers)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn`` in a worker.

        Raises:
            RuntimeError: If the executor was shut down.
        """
        future: Future[Any] = self._executor.submit(_call, fn, args, kwargs)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; drop those that have not begun, or wait for all."""
        self._executor.shutdown(wait=wait, cancel_futures=cancel_futures)


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Processes that a task spawns (DDP) import what this one was started with, mpi4py that is, and
    # must not take themselves for it.
    os.environ["MPI4PY_RC_INITIALIZE"] = "0"
    return fn(*args, **kwargs)
