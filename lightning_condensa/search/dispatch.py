"""Trials in flight: handed to an executor, and run once more where a worker was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    wait,
)
from types import TracebackType

from lightning_condensa.search.executors import InProcess, worker_count
from lightning_condensa.search.trial import TrialJob, TrialOutcome, out_of_memory, run_trial

ExecutorLike = Executor | Callable[[], Executor]


class Dispatcher:
    """Keeps trials in flight and gives back whichever ends first.

    What a trial's own code raises is part of its outcome; any other error is the
    infrastructure's (a dead worker, no memory). Then the same job is submitted once more, and
    counts as failed only if that is lost, too.

    Args:
        executor: Where trials run; a function that makes an executor is called again when that
            one breaks.
        parallel: Trials in flight; as many as the executor has workers where ``None``.
        notify: Is told of lost workers.
    """

    def __init__(
        self, executor: ExecutorLike, parallel: int | None, notify: Callable[[str], None]
    ) -> None:
        self._make = None if isinstance(executor, Executor) else executor
        self._executor = executor if isinstance(executor, Executor) else executor()
        self._parallel, self._notify = parallel, notify
        self._flying: dict[Future[TrialOutcome], TrialJob] = {}
        self._retried: set[int] = set()
        self._proven = False

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop what still runs; an executor that was made here ends, others are their owner's."""
        for future in self._flying:
            future.cancel()
        terminate = getattr(self._executor, "terminate_workers", None)
        if self._flying and terminate is not None:  # ours, and the standard one from Python 3.14
            terminate()
        if self._make is not None:
            self._executor.shutdown(wait=not self._flying, cancel_futures=True)

    @property
    def local(self) -> bool:
        """Whether trials run in this process."""
        return isinstance(self._executor, InProcess)

    @property
    def running(self) -> int:
        """Trials in flight."""
        return len(self._flying)

    @property
    def room(self) -> bool:
        """Whether another trial may be submitted."""
        return self.running < (self._parallel or worker_count(self._executor))

    def submit(self, job: TrialJob) -> None:
        """Hand out a trial.

        Raises:
            RuntimeError: If the executor is broken and cannot be made again.
        """
        try:
            future = self._executor.submit(run_trial, job)
        except BrokenExecutor as error:
            if self._make is None:
                raise RuntimeError(
                    f"{type(self._executor).__name__} broke and takes no more trials ({error}); "
                    "run the search again to go on, with executor=ProcessPool(…), which outlives "
                    "its workers, or with a function that makes executors"
                ) from error
            self._executor.shutdown(wait=False)
            self._executor = self._make()
            future = self._executor.submit(run_trial, job)
        self._flying[future] = job

    def next(self) -> tuple[TrialJob, TrialOutcome]:
        """Wait until a trial ends; of several the one with the lowest number.

        Raises:
            RuntimeError: If the executor could not run even the first trial.
        """
        while True:
            ended, _ = wait(self._flying, return_when=FIRST_COMPLETED)
            job, error, outcome = self._take(ended)
            if outcome is not None:
                return job, outcome
            text = f"{type(error).__name__}: {error}"
            if job.number not in self._retried:
                self._retried.add(job.number)
                self._notify(f"trial {job.number} was lost and is run again ({text})")
                self.submit(job)
            elif self._proven or (error is not None and out_of_memory(error)):
                return job, TrialOutcome("failed", message=text)
            else:
                name = type(self._executor).__name__
                raise RuntimeError(f"{name} could not run any trial: {text}") from error

    def ended(self) -> Iterator[tuple[TrialJob, TrialOutcome]]:
        """The trials that have ended by now, without waiting, lost ones left out."""
        while ended := [f for f in self._flying if f.done()]:
            job, _, outcome = self._take(ended)
            if outcome is not None:
                yield job, outcome

    def _take(
        self, ended: set[Future[TrialOutcome]] | list[Future[TrialOutcome]]
    ) -> tuple[TrialJob, BaseException | None, TrialOutcome | None]:
        future = min(ended, key=lambda f: self._flying[f].number)
        job = self._flying.pop(future)
        error = CancelledError("cancelled") if future.cancelled() else future.exception()
        if isinstance(error, KeyboardInterrupt):
            raise error
        if error is not None:
            return job, error, None
        self._proven = True
        return job, None, future.result()
