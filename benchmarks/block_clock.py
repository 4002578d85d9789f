"""Times training runs that take turns, block by block, so that a noisy machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Semaphore

import torch

#: Optimizer steps that are timed together: those of L-C before a C-step, in which it also sums
#: squared gradients, and as many of any other kind.
BLOCK = 8


def now(device: str) -> float:
    """Seconds of a clock, read when the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class BlockClock:
    """Mean seconds of a step in each block of one run.

    Attributes:
        seconds: Of each whole block so far.
    """

    def __init__(self, device: str, turn: Callable[[], None]) -> None:
        self.seconds: list[float] = []
        self._device = device
        self._turn = turn
        self._steps = 0
        self._started = 0.0

    def step(self) -> None:
        """Note that a step begins; where a block ends, let the other runs make theirs."""
        if self._steps % BLOCK == 0:
            if self._steps > 0:
                self.seconds.append((now(self._device) - self._started) / BLOCK)
            self._turn()
            self._started = now(self._device)
        self._steps += 1


class _Turns:
    """Lets one of several threads go on at a time, in a circle."""

    def __init__(self, threads: int) -> None:
        self._here = list(range(threads))
        self._mine = [Semaphore(int(i == 0)) for i in range(threads)]

    def enter(self, i: int) -> None:
        """Wait for the first turn."""
        self._mine[i].acquire()

    def next(self, i: int) -> None:
        """Let each other thread have a turn."""
        self._after(i).release()
        self._mine[i].acquire()

    def leave(self, i: int) -> None:
        """Let the others go on without this thread."""
        after = self._after(i)
        self._here.remove(i)
        after.release()

    def _after(self, i: int) -> Semaphore:
        return self._mine[self._here[(self._here.index(i) + 1) % len(self._here)]]


def take_turns(runs: Sequence[Callable[[BlockClock], None]], device: str) -> list[list[float]]:
    """Make training runs in threads of which only one goes on at a time.

    Args:
        runs: Training loops that call `BlockClock.step` at the same place of every step.
        device: Where they train.

    Returns:
        Of each run, what its clock measured.
    """
    turns = _Turns(len(runs))
    clocks = [BlockClock(device, partial(turns.next, i)) for i in range(len(runs))]

    def go(i: int) -> None:
        torch.set_num_threads(1)  # counts for the thread that calls it
        turns.enter(i)
        try:
            runs[i](clocks[i])
        finally:
            turns.leave(i)

    with ThreadPoolExecutor(len(runs)) as threads:
        for done in [threads.submit(go, i) for i in range(len(runs))]:
            done.result()
    return [clock.seconds for clock in clocks]
