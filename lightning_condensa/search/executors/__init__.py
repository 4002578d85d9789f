"""Where trials run: anything that is a ``concurrent.futures.Executor``, and some that we bring."""

from lightning_condensa.search.executors.base import WorkerLostError, worker_count
from lightning_condensa.search.executors.dask import DaskExecutor
from lightning_condensa.search.executors.inline import InProcess
from lightning_condensa.search.executors.mpi import MPIExecutor
from lightning_condensa.search.executors.pool import ProcessPool
from lightning_condensa.search.executors.ray import RayExecutor
from lightning_condensa.search.executors.slurm import SubmititExecutor

__all__ = [
    "DaskExecutor",
    "InProcess",
    "MPIExecutor",
    "ProcessPool",
    "RayExecutor",
    "SubmititExecutor",
    "WorkerLostError",
    "worker_count",
]
