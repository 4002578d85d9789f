"""Trials as jobs of a batch system, through submitit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from lightning_condensa.search.executors.base import LinkedFuture, require


class SubmititExecutor(Executor):
    """Runs each task as a job of a ``submitit`` executor: Slurm, or local processes.

    Args:
        executor: ``submitit.AutoExecutor(folder=…)`` or another, with its parameters set.
        workers: Jobs in the queue at a time.
        poll: Seconds between two looks at the jobs.

    Raises:
        ModuleNotFoundError: Without ``submitit``.
        ValueError: If ``workers`` is below 1 or ``poll`` is not positive.

    Example:
        >>> slurm = submitit.AutoExecutor(folder="jobs")  # doctest: +SKIP
        >>> slurm.update_parameters(timeout_min=240, gpus_per_node=1)  # doctest: +SKIP
        >>> executor = SubmititExecutor(slurm, workers=8)  # doctest: +SKIP
    """

    def __init__(self, executor: Any, workers: int, poll: float = 1.0) -> None:
        require("submitit", "submitit")
        if workers < 1:
            raise ValueError(f"workers must be an int >= 1, got {workers!r}")
        if not poll > 0:
            raise ValueError(f"poll must be > 0, got {poll!r}")
        self.workers = workers
        self._executor, self._poll = executor, poll
        self._jobs: dict[LinkedFuture, Any] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._watcher = threading.Thread(target=self._watch, name="condensa-jobs", daemon=True)
        self._watcher.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue ``fn`` as a job.

        Raises:
            RuntimeError: If the executor was shut down.
        """
        if self._closed:
            raise RuntimeError("the executor was shut down")
        job = self._executor.submit(_attempt, fn, args, kwargs)
        future = LinkedFuture(job.cancel)
        with self._changed:
            self._jobs[future] = job
            self._changed.notify()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; wait for those in the queue, or cancel them."""
        with self._changed:
            self._closed = True
            for future in list(self._jobs) if cancel_futures else []:
                future.cancel()
            self._changed.notify()
        if wait:
            self._watcher.join()

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                ended = [f for f, job in self._jobs.items() if f.cancelled() or job.done()]
                jobs = [(future, self._jobs.pop(future)) for future in ended]
            for future, job in jobs:
                _settle(future, job)
            with self._changed:
                if self._jobs:
                    self._changed.wait(self._poll)


def _attempt(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Exception | None]:
    """In the job: submitit would bring back an error only as text."""
    try:
        return fn(*args, **kwargs), None
    except Exception as error:
        return None, error


def _settle(future: LinkedFuture, job: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        value, error = job.result()
    except Exception as lost:  # the job itself
        value, error = None, lost
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
