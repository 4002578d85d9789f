"""Spawned worker processes that may die without breaking the pool."""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

import torch

from lightning_condensa.search.executors.base import WorkerLostError
from lightning_condensa.search.executors.worker import Reply, kill_group, work

_SPAWN = get_context("spawn")


@dataclass(frozen=True)
class _Task:
    payload: bytes
    future: Future[Any]


class ProcessPool(Executor):
    """Runs tasks in processes of its own, each with its share of the cores and at most one GPU.

    Unlike ``ProcessPoolExecutor`` it outlives its workers: the task of one that dies gets a
    :class:`WorkerLostError`, the others go on, and a new process takes the place. Workers may
    have children (DDP, loaders), which end with them, ignore Ctrl-C, which is the parent's to
    handle, and die with their parent. As with every spawned process, a script that makes a pool
    needs ``if __name__ == "__main__":``.

    Args:
        workers: Number of processes; they start at once.
        threads: Threads of torch in each; the cores divided by the workers where ``None``.
        gpus: Devices as in ``CUDA_VISIBLE_DEVICES``, handed out in turn; those that this process
            sees where ``None``, none where empty.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> from lightning_condensa.search.executors import ProcessPool
        >>> pool = ProcessPool(4, threads=2)  # doctest: +SKIP
        >>> CondensaSearch(…, executor=pool)  # doctest: +SKIP
    """

    def __init__(
        self,
        workers: int,
        *,
        threads: int | None = None,
        gpus: Sequence[int | str] | None = None,
    ) -> None:
        for name, value in (("workers", workers), ("threads", threads)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        threads = threads or max(1, _cores() // workers)
        devices = _visible_gpus() if gpus is None else [str(gpu) for gpu in gpus]
        self.workers = workers
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._closed = False
        self._seats = [
            _Seat(self._tasks, threads, devices[i % len(devices)] if devices else None)
            for i in range(workers)
        ]
        # Before multiprocessing's own exit handler, which would wait for the workers for ever.
        self._at_exit = functools.partial(_kill, self._seats)
        atexit.register(self._at_exit)
        for seat in self._seats:
            seat.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn`` in a worker.

        Raises:
            Exception: What pickling raises, where the task cannot be sent.
            RuntimeError: If the pool was shut down.
        """
        if self._closed:
            raise RuntimeError("the pool was shut down")
        task = _Task(pickle.dumps((fn, args, kwargs)), Future())
        self._tasks.put(task)
        return task.future

    def terminate_workers(self) -> None:
        """Kill what runs and drop what waits; the pool stays usable."""
        self._drop_waiting()
        _kill(self._seats)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the workers end when the tasks have.

        Args:
            wait: Whether to return only then.
            cancel_futures: Whether to drop the tasks that have not begun.
        """
        if not self._closed:
            self._closed = True
            if cancel_futures:
                self._drop_waiting()
            for _ in self._seats:
                self._tasks.put(None)
        if wait:
            for seat in self._seats:
                seat.join()
            atexit.unregister(self._at_exit)

    def _drop_waiting(self) -> None:
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                return
            if task is None:  # someone else's end
                self._tasks.put(None)
                return
            task.future.cancel()
            task.future.set_running_or_notify_cancel()  # tells those who wait for it


class _Seat(threading.Thread):
    """A thread of the parent that keeps one worker process busy, and replaces it when it dies."""

    def __init__(
        self, tasks: queue.SimpleQueue[_Task | None], threads: int, gpu: str | None
    ) -> None:
        super().__init__(name="condensa-worker", daemon=True)
        self._tasks, self._settings = tasks, (threads, gpu)
        self._lock = threading.Lock()
        self._launch()

    def run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if not task.future.set_running_or_notify_cancel():
                continue
            try:
                reply = self._exchange(task.payload)
            except Exception as error:
                task.future.set_exception(error)
                continue
            if reply.error is None:
                task.future.set_result(reply.value)
            else:
                reply.error.__cause__ = RuntimeError(f"in the worker:\n{reply.trace}")
                task.future.set_exception(reply.error)
        self._connection.close()  # the worker ends at the end of its input
        self._process.join()

    def kill(self) -> None:
        with self._lock:
            if self._process.is_alive():  # the number of one long dead may be another's
                kill_group(self._process)

    def _launch(self) -> None:
        with self._lock:
            self._connection, theirs = _SPAWN.Pipe()
            self._process = _SPAWN.Process(target=work, args=(theirs, *self._settings))
            self._process.start()
            theirs.close()  # so that its death is the end of our input

    def _exchange(self, payload: bytes) -> Reply:
        if not self._process.is_alive():
            self._connection.close()
            self._launch()
        try:
            self._connection.send_bytes(payload)
            # A worker may have children that hold its end of the pipe, so its death is watched.
            wait([self._connection, self._process.sentinel])
            if not self._connection.poll():
                raise EOFError
            answer = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            kill_group(self._process)
            self._process.join()
            code = self._process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            raise WorkerLostError(f"worker process {self._process.pid} ended: {how}") from error
        reply: Reply = pickle.loads(answer)
        return reply


def _kill(seats: Sequence[_Seat]) -> None:
    for seat in seats:
        seat.kill()


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _visible_gpus() -> list[str]:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [entry.strip() for entry in listed.split(",") if entry.strip()]
    return [str(i) for i in range(torch.cuda.device_count())]
