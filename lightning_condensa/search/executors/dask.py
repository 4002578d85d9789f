"""Trials on a Dask cluster."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Executor, Future
from typing import Any

from lightning_condensa.search.executors.base import require


class DaskExecutor(Executor):
    """Runs tasks through a ``dask.distributed.Client``, one per worker at a time.

    Dask itself runs a lost worker's task again elsewhere, up to the cluster's
    ``allowed-failures``. A worker with several threads would train several trials in one process:
    give workers one thread (``dask worker --nthreads 1``).

    Args:
        client: Connected to the cluster; it stays open.
        **options: Of ``Client.submit``, such as ``resources={"GPU": 1}``.

    Raises:
        ModuleNotFoundError: Without ``distributed``.

    Example:
        >>> from distributed import Client  # doctest: +SKIP
        >>> executor = DaskExecutor(Client("tcp://scheduler:8786"))  # doctest: +SKIP
    """

    def __init__(self, client: Any, **options: Any) -> None:
        require("distributed", "distributed")
        self._client = client
        self._executor = client.get_executor(pure=False, **options)
        self._flying: set[Future[Any]] = set()

    @property
    def workers(self) -> int:
        """The workers that the cluster has now."""
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn`` on the cluster."""
        future: Future[Any] = self._executor.submit(_call, fn, args, kwargs)
        self._flying.add(future)
        future.add_done_callback(self._flying.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the tasks, or cancel them, running ones too; the client stays open."""
        flying = list(self._flying)
        if wait or cancel_futures:
            self._executor.shutdown(wait=not cancel_futures)  # waits, or else cancels
        if wait:
            futures.wait(flying)


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # A worker that Dask watches over is daemonic, and must not start the processes of DDP or of a
    # data loader. It may be told otherwise.
    multiprocessing.current_process().daemon = False
    return fn(*args, **kwargs)
