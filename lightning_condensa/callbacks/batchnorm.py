"""Batch norm statistics that belong to compressed weights.

Running statistics describe the activations of the weights that train. Where the compressed ones
differ from those they no longer fit, and the network does worse than its weights could. Estimated
anew on a few batches they fit again; no weight changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_condensa.functional.placement import reshard
from lightning_condensa.lc import LCRun
from lightning_condensa.schemes import Encoding

#: Relative change of a weight up to which statistics stay. Rounding to int8 changes weights by
#: about 0.01; estimates from a few batches would only be noisier.
_NEGLIGIBLE = 0.02


class BatchNormStatistics:
    """Repeats the last training batches with other weights, to estimate running statistics.

    Repeated are the calls that ``training_step`` makes before its first backward pass, with the
    inputs it gave: ``self(x)``, or ``self.net(x)`` where ``net`` is a child of the module that
    holds batch norm layers. Of children that feed one another each sees what it was given in
    training. A compiled module is not watched, nor are parts further down.

    The module is in evaluation mode but for these layers, logs nothing, and leaves the random
    number generators as they were. Inputs are kept as they are, on the device, and dropped when
    an epoch begins.

    Args:
        module: The module that trains.
        batches: How many batches to keep; none where the module has no such layers.
        redirected: Whether the outermost call of ``module`` in each step is the strategy's way to
            ``training_step``.
    """

    def __init__(self, module: nn.Module, batches: int, redirected: bool = False) -> None:
        self._module = module
        self._active = batches > 0 and bool(_layers(module))
        self._redirected = redirected
        self._batches: deque[list[tuple[str, Any, Any]]] = deque(maxlen=batches)
        self._layers: list[str] = []
        self._handles: list[Any] = []
        self._depth = 0
        self._warned = False

    @property
    def names(self) -> list[str]:
        """The buffers that estimates change."""
        layers = _layers(self._module) if self._active else {}
        return [f"{name}.{key}" for name, m in layers.items() for key, _ in m.named_buffers()]

    def stale(self, run: LCRun, theta: Mapping[str, Encoding]) -> bool:
        """Whether the statistics of the weights that train do not fit θ."""
        return self._active and max(run.relative_gaps(theta).values()) > _NEGLIGIBLE

    def open(self, batch_idx: int, needed: bool = True) -> None:
        """Keep the calls of the batch that begins; keep none where they are not needed."""
        self.close()
        if not needed:
            self._batches.clear()
        if not needed or not self._active:
            return
        if batch_idx == 0:
            self._batches.clear()
        self._batches.append([])
        self._layers = [name for name, layer in _layers(self._module).items() if layer.training]
        self._depth = 0
        for name, part in _callable_parts(self._module):
            self._handles += [
                part.register_forward_pre_hook(self._keeper(name), with_kwargs=True),
                part.register_forward_hook(self._leave, always_call=True),
            ]

    def close(self) -> None:
        """Keep no more of this batch."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        """Drop all that was kept."""
        self.close()
        self._batches.clear()

    def estimate(self, trainer: pl.Trainer, module: nn.Module) -> None:
        """Give a module the statistics of its present weights, the same on all ranks.

        Args:
            trainer: The trainer.
            module: The module that trains, or a copy.
        """
        calls = [call for batch in self._batches for call in batch]
        here, there = (next(m.parameters()).device for m in (self._module, module))
        # Synchronized layers wait for all ranks in each call.
        seen = torch.tensor(len(calls), device=here)
        common = int(trainer.strategy.reduce(seen, reduce_op="min"))
        if not common or here != there:
            self._warn()
            return
        layers = [layer for name, layer in _layers(module).items() if name in self._layers]
        with ExitStack() as stack:
            for context in (torch.inference_mode(False), torch.no_grad(), isolate_rng()):
                stack.enter_context(context)
            for context in (_estimating(module, layers), _without_logs(module)):
                stack.enter_context(context)
            stack.enter_context(trainer.precision_plugin.forward_context())
            for name, args, kwargs in calls[-common:]:
                part = module.get_submodule(name)
                getattr(part, "_orig_mod", part)(*args, **kwargs)
        for layer in layers:
            for statistic in (layer.running_mean, layer.running_var):
                assert statistic is not None
                statistic.copy_(trainer.strategy.reduce(statistic.clone(), reduce_op="mean"))
        reshard(module)

    def _keeper(self, name: str) -> Any:
        def keep(part: nn.Module, args: Any, kwargs: Any) -> None:
            if self._depth == self._redirected:
                inputs = apply_to_collection((args, kwargs), Tensor, Tensor.detach)
                self._batches[-1].append((name, *inputs))
            self._depth += 1

        return keep

    def _leave(self, part: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                "the compressed model has batch norm statistics of the training weights: "
                "training_step was not seen to call self(x), or a child of "
                f"{type(self._module).__name__} that holds such layers (bn_batches=0 keeps the "
                "training weights' without this warning)"
            )


def _layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norm layers with running statistics, by name."""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, _BatchNorm)}
    return {n: m for n, m in layers.items() if m.track_running_stats and m.running_mean is not None}


def _callable_parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module and its children with batch norm layers, of containers the elements."""
    if getattr(module, "_compiler_ctx", None):  # hooks would be traced, and break its graph
        return
    yield "", module
    queue = deque(module.named_children())
    while queue:
        name, child = queue.popleft()
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            queue.extend((f"{name}.{key}", part) for key, part in child.named_children())
        elif not isinstance(child, _BatchNorm) and any(
            isinstance(part, _BatchNorm) for part in child.modules()
        ):
            yield name, child


@contextmanager
def _estimating(module: nn.Module, layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Evaluation mode but for ``layers``, whose statistics begin anew and count batches alike."""
    modes = {part: part.training for part in module.modules()}
    before = [{name: t.clone() for name, t in layer.named_buffers()} for layer in layers]
    momenta = [layer.momentum for layer in layers]
    module.eval()
    for layer in layers:
        layer.train()
        layer.reset_running_stats()
        layer.momentum = None
    try:
        yield
    finally:
        for layer, momentum, buffers in zip(layers, momenta, before, strict=True):
            layer.momentum = momentum
            if layer.num_batches_tracked:
                buffers = {"num_batches_tracked": buffers["num_batches_tracked"]}
            for name, value in buffers.items():  # all of them, for a layer that was not called
                layer.get_buffer(name).copy_(value)
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def _without_logs(module: nn.Module) -> Iterator[None]:
    """``module.log`` does nothing."""
    module.log = lambda *args, **kwargs: None  # type: ignore[assignment]
    try:
        yield
    finally:
        del module.log
