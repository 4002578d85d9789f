"""What an executor must do to run trials, as checks; part of :mod:`lightning_condensa.testing`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, wait
from multiprocessing import get_context

import torch
from torch import Tensor

from lightning_condensa.search.executors.base import worker_count

#: Seconds within which anything must have happened.
PATIENCE = 120.0


def check_executor(make: Callable[[], Executor], law: str) -> None:
    """Check that an executor keeps a law.

    Args:
        make: Makes one; it is shut down afterwards.
        law: One of :data:`EXECUTOR_LAWS`.

    Raises:
        AssertionError: If it does not; says what was seen.
        ValueError: If there is no such law.

    Example:
        >>> from lightning_condensa.search.executors import InProcess
        >>> check_executor(InProcess, "returns")
    """
    if law not in EXECUTOR_LAWS:
        raise ValueError(f"law must be one of {sorted(EXECUTOR_LAWS)}, got {law!r}")
    EXECUTOR_LAWS[law](make)


def _returns(make: Callable[[], Executor]) -> None:
    with make() as executor:
        got = executor.submit(divmod, 7, 2).result(PATIENCE)
        assert got == (3, 1), f"divmod(7, 2) returned {got}"
        named = executor.submit(int, "11", base=2).result(PATIENCE)
        assert named == 3, f"int('11', base=2) returned {named}: keywords are lost"


def _raises(make: Callable[[], Executor]) -> None:
    with make() as executor:
        error = executor.submit(int, "one").exception(PATIENCE)
        assert isinstance(error, ValueError), f"a ValueError arrived as {error!r}"
        again = executor.submit(int, "1").result(PATIENCE)
        assert again == 1, f"after an error int('1') returned {again}"


def _carries(make: Callable[[], Executor]) -> None:
    sent = torch.arange(1_000_000, dtype=torch.float32)
    with make() as executor:
        back = executor.submit(torch.neg, sent).result(PATIENCE)
    assert isinstance(back, Tensor), f"a tensor arrived as {type(back).__name__}"
    assert torch.equal(back, -sent), "a tensor of 4 MB arrived changed"


def _orders(make: Callable[[], Executor]) -> None:
    with make() as executor:
        futures = [executor.submit(divmod, i, 3) for i in range(10)]
        got = [f.result(PATIENCE) for f in futures]
    assert got == [divmod(i, 3) for i in range(10)], f"results are mixed up: {got}"


def _parallel(make: Callable[[], Executor]) -> None:
    with make() as executor:
        count = worker_count(executor)
        assert count >= 1, f"it has {count} workers"
        warm = [executor.submit(_span, 0.5) for _ in range(count)]  # processes may have to start
        wait(warm, PATIENCE)
        spans = [f.result(PATIENCE) for f in [executor.submit(_span, 2.0) for _ in range(count)]]
    last, first = max(s[0] for s in spans), min(s[1] for s in spans)
    assert last < first, f"{count} tasks of 2 s did not all overlap: {sorted(spans)}"


def _span(seconds: float) -> tuple[float, float]:
    began = time.time()
    time.sleep(seconds)
    return began, time.time()


def _starts_processes(make: Callable[[], Executor]) -> None:
    with make() as executor:
        code = executor.submit(_start_one).result(PATIENCE)
    assert code == 0, f"a process that a task started ended with exit code {code}"


def _start_one() -> int | None:
    process = get_context("spawn").Process(target=time.sleep, args=(0.0,))
    process.start()
    process.join(PATIENCE)
    return process.exitcode


def _survives(make: Callable[[], Executor]) -> None:
    executor = make()
    try:
        if executor.submit(os.getpid).result(PATIENCE) == os.getpid():
            return  # no other process to lose
        lost = executor.submit(_die).exception(PATIENCE)
        assert lost is not None, "a task whose process died was said to have ended well"
        try:
            got = executor.submit(divmod, 7, 2).result(PATIENCE)
        except BrokenExecutor:  # allowed, and said so: a search then makes another
            executor.shutdown()
            executor = make()
            got = executor.submit(divmod, 7, 2).result(PATIENCE)
        assert got == (3, 1), f"after a worker's death divmod(7, 2) returned {got}"
    finally:
        executor.shutdown()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _ends(make: Callable[[], Executor]) -> None:
    executor = make()
    future = executor.submit(_span, 0.5)
    executor.shutdown(wait=True)
    assert future.done(), "shutdown(wait=True) returned before the task ended"
    executor.shutdown(wait=True)


#: Laws by name: results and errors come back as they are, tasks run at the same time on
#: ``worker_count`` workers and may start processes (DDP, data loaders), a dead worker is noticed
#: and survived, ``shutdown`` waits.
EXECUTOR_LAWS: Mapping[str, Callable[[Callable[[], Executor]], None]] = {
    "returns": _returns,
    "raises": _raises,
    "carries tensors": _carries,
    "keeps results apart": _orders,
    "runs in parallel": _parallel,
    "starts processes": _starts_processes,
    "survives a dead worker": _survives,
    "ends": _ends,
}
