"""Calling the teacher wherever a training step calls the student, and timing it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn


class Stopwatch:
    """Time on the device's own clock, read without waiting for the device.

    Args:
        device: CUDA events measure on CUDA; elsewhere the clock on the wall.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begin: Any = None
        self._spans: deque[tuple[Any, Any]] = deque()
        self._total = 0.0

    def start(self) -> None:
        """Begin a span."""
        self._begin = self._now()

    def stop(self) -> None:
        """End the span."""
        self._spans.append((self._begin, self._now()))
        while self._spans and (not self._cuda or self._spans[0][1].query()):
            self._count(*self._spans.popleft())

    def seconds(self) -> float:
        """All spans together."""
        while self._spans:
            self._spans[0][1].synchronize()
            self._count(*self._spans.popleft())
        return self._total

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _count(self, begin: Any, end: Any) -> None:
        self._total += begin.elapsed_time(end) / 1000 if self._cuda else end - begin


class Tap:
    """Calls the teacher wherever the student is called, with the same arguments.

    It uses hooks that exist while a training step runs forward, and no longer.

    Args:
        student: The module to watch.
        teacher: The module to call.
        key: Of the logits in what they return.
        redirected: Whether the outermost call of ``student`` in each step is the strategy's way
            to ``training_step``.
        foreign: Parameters that the teacher must not use.
        stopwatch: Runs while the teacher does.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        key: str | int | None,
        redirected: bool,
        foreign: Iterable[nn.Parameter],
        stopwatch: Stopwatch,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._key = key
        self._redirected = redirected
        self._foreign = {id(p) for p in foreign}
        self._stopwatch = stopwatch
        self._handles: list[Any] = []
        self._running: list[Tensor | None] = []  # the teacher's logits of each call under way
        self._pairs: list[tuple[Tensor, int, Tensor]] = []
        # Traced into a compiled student, the hooks would fuse the teacher with it.
        disable: Any = torch.compiler.disable
        self._before, self._after = disable(self._call_teacher), disable(self._pair_up)

    def open(self) -> None:
        """Watch from now on."""
        self.close()
        self._handles = [
            self._student.register_forward_pre_hook(self._before, with_kwargs=True),
            self._student.register_forward_hook(self._after),
        ]

    def close(self) -> None:
        """Watch no more, and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._running, self._pairs = [], [], []

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Logits of student and teacher for every call that was seen.

        Raises:
            ValueError: If the student's were changed in place since.
        """
        if any(logits._version != version for logits, version, _ in self._pairs):
            raise ValueError(
                "training_step changed the logits in place: distillation needs them as returned"
            )
        return [(logits, target) for logits, _, target in self._pairs]

    def _call_teacher(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        outermost = self._redirected and not self._running
        target = None
        if self._handles and torch.is_grad_enabled() and not outermost:
            foreign, self._foreign = self._foreign, set()
            if foreign:
                args, kwargs = apply_to_collection((args, kwargs), Tensor, _detach)
            self._stopwatch.start()
            with torch.set_grad_enabled(bool(foreign)):
                target = _logits(self._teacher(*args, **kwargs), self._key, "teacher")
            self._stopwatch.stop()
            self._check_independence(target, foreign)
            target = target.detach()
        self._running.append(target)

    def _check_independence(self, logits: Tensor, foreign: set[int]) -> None:
        """Look at the first call's graph: closures over the original survive a copy."""
        nodes, seen = [logits.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if id(getattr(node, "variable", None)) in foreign:
                raise ValueError(
                    f"the copy of {type(self._student).__name__} still uses weights of the "
                    "original, through a compiled method or a function that holds it: give "
                    "Distillation a teacher"
                )

    def _pair_up(self, module: nn.Module, args: Any, output: Any) -> None:
        target = self._running.pop()
        if target is not None:
            logits = _logits(output, self._key, "student")
            if logits.requires_grad:
                self._pairs.append((logits, logits._version, target))


def _detach(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _logits(output: Any, key: str | int | None, whose: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    try:
        value = output[key]
    except (KeyError, IndexError, TypeError):
        value = None
    if not isinstance(value, Tensor):
        raise ValueError(
            f"logits must be the key or index of a tensor in the {type(output).__name__} that the "
            f"{whose} returns, got {key!r}"
        )
    return value
