"""What executors have in common."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import Executor, Future
from types import ModuleType
from typing import Any


class WorkerLostError(RuntimeError):
    """A worker ended before its task did."""


class LinkedFuture(Future[Any]):
    """A future of work elsewhere, which ``cancel`` stops there even when it has begun.

    Args:
        stop: Stops the work.
    """

    def __init__(self, stop: Callable[[], object]) -> None:
        super().__init__()
        self._stop = stop

    def cancel(self) -> bool:
        """Stop the work, unless it is done."""
        if not self.done():
            self._stop()
        return super().cancel()


def worker_count(executor: Executor) -> int:
    """How many tasks an executor runs at the same time; 1 where it does not say.

    Our executors say it by ``workers``, which may change as a cluster grows, mpi4py by
    ``num_workers``, the pools of the standard library by ``_max_workers``.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> worker_count(ThreadPoolExecutor(3))
        3
    """
    for name in ("workers", "num_workers", "_max_workers"):
        count = getattr(executor, name, None)
        if isinstance(count, int):
            return max(1, count)
    return 1


def require(
    module: str, package: str, install: str = "'lightning-condensa[distributed]'"
) -> ModuleType:
    """Import an optional package.

    Raises:
        ModuleNotFoundError: If it is missing; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this executor needs {package}: pip install {install}"
        ) from error
