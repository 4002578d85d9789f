"""A learning rate for the sparse network, beside the user's own schedulers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class SparseRates:
    """Multiplies learning rates inside optimizer steps, and only there.

    Schedulers, monitors and checkpoints see the user's learning rates: those are back in place when
    the step is done. Parameter groups without a pruned parameter keep theirs.

    Args:
        factor: The factor of the coming step.
        pruned: The parameters that are pruned.
    """

    def __init__(self, factor: Callable[[], float], pruned: Collection[Tensor]) -> None:
        self._factor = factor
        self._pruned = {id(p) for p in pruned}
        self._handles: list[RemovableHandle] = []
        self._own: list[tuple[dict[str, Any], Any]] = []

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Hook into the steps of some optimizers."""
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._raise))
            self._handles.append(optimizer.register_step_post_hook(self._restore))

    def detach(self) -> None:
        """Leave the optimizers as they were; also after a step that failed."""
        self._restore()
        while self._handles:
            self._handles.pop().remove()

    def _raise(self, optimizer: Optimizer, *args: object) -> None:
        self._restore()
        factor = self._factor()
        for group in optimizer.param_groups if factor != 1 else ():
            lr = group.get("lr")  # some optimizers find their own
            if lr is not None and any(id(p) in self._pruned for p in group["params"]):
                self._own.append((group, lr))
                group["lr"] = lr * factor

    def _restore(self, *args: object) -> None:
        while self._own:
            group, lr = self._own.pop()
            group["lr"] = lr
