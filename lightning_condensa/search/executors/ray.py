"""Trials on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Executor, Future
from typing import Any

from lightning_condensa.search.executors.base import LinkedFuture, require


class RayExecutor(Executor):
    """Runs each task as a Ray task; connects to Ray where the process has not done so.

    Args:
        workers: Tasks at a time; as many as the cluster has room for where ``None``.
        **options: Of the remote function, such as ``num_cpus=4, num_gpus=1``.

    Raises:
        ModuleNotFoundError: Without ``ray``.

    Example:
        >>> executor = RayExecutor(num_cpus=4, num_gpus=1)  # doctest: +SKIP
    """

    def __init__(self, workers: int | None = None, **options: Any) -> None:
        self._ray = require("ray", "ray")
        if not self._ray.is_initialized():
            self._ray.init()
        self._workers = workers
        self._options = {"num_cpus": 1, "max_retries": 0, **options}
        self._flying: set[LinkedFuture] = set()

    @property
    def workers(self) -> int:
        """Tasks that the cluster has room for."""
        if self._workers is not None:
            return self._workers
        have = self._ray.cluster_resources()
        wanted = {"CPU": self._options["num_cpus"], "GPU": self._options.get("num_gpus", 0)}
        return max(1, min(int(have.get(k, 0) / need) for k, need in wanted.items() if need))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn`` on the cluster."""
        # Ray would take the decorated function itself for its payload's module.
        remote = self._ray.remote(_call).options(**self._options)
        reference = remote.remote(fn, args, kwargs)
        future = LinkedFuture(lambda: self._ray.cancel(reference, force=True))
        self._flying.add(future)
        reference.future().add_done_callback(lambda done: self._settle(future, done))
        return future

    def _settle(self, future: LinkedFuture, done: Future[Any]) -> None:
        self._flying.discard(future)
        if not future.set_running_or_notify_cancel():
            return
        error = done.exception()
        if error is None:
            future.set_result(done.result())
        else:
            future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the tasks, or cancel them; Ray stays up."""
        flying = list(self._flying)
        for future in flying if cancel_futures else []:
            future.cancel()
        if wait:  # for the futures: Ray knows of a result a little before they do
            futures.wait(flying)


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return fn(*args, **kwargs)
