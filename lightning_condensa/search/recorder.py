"""A Lightning callback that collects a score per sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_condensa.search.scores import PerSample, Scores, checksum, scores_of


class ScoreRecorder(pl.Callback):
    """Collects a score per sample in a validation or test run, and writes them to a file.

    The scores come from the first of these that is there:

    1. ``per_sample(outputs, batch)``, with what ``validation_step`` returned.
    2. What ``validation_step`` returned, if it is a mapping with the metric's name: a tensor
       ``[n]``.
    3. The same with ``"logits"`` or ``"preds"``, and ``"target"``.
    4. What the module's ``self(x)`` returned, a tensor or a mapping with ``"logits"``, with the
       batch's ``"target"``, ``"label"`` or last entry.

    In the last two cases accuracy, cross entropy, squared and absolute error are tried. Only a
    score whose mean reproduces the logged metric is kept. Processes of a distributed run are put
    one after the other, if they have as many samples each.

    Nothing is left on the module: a hook sees ``self(x)`` while a step runs, and no longer.

    Args:
        path: The file.
        metric: The logged metric that the scores belong to.
        per_sample: See above.
    """

    def __init__(self, path: Path, metric: str, per_sample: PerSample | None = None) -> None:
        self.path, self.metric, self.per_sample = path, metric, per_sample
        self._loader = _loader_of(metric)
        self._clear()

    def _clear(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        self._sums: list[Tensor] = []
        self._called: list[Any] = []
        self._reason = ""
        self._handle: Any = None

    def _start(self) -> None:
        self._clear()
        self.path.unlink(missing_ok=True)

    def _watch(self, pl_module: pl.LightningModule) -> None:
        self._called = []
        if self.per_sample is None:
            disable: Any = torch.compiler.disable  # no part of a compiled module
            self._handle = pl_module.register_forward_hook(disable(self._keep))

    def _keep(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._called = self._called or [output]

    def _unwatch(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _collect(self, outputs: Any, batch: Any, loader: int) -> None:
        self._unwatch()
        if self._reason or self._loader not in (None, loader):
            return
        scores = scores_of(outputs, batch, self._called, self.metric, self.per_sample)
        self._called = []
        found = checksum(batch)
        kinds = [name for name in scores if not self._sums or name in self._parts]
        if not kinds:
            self._reason = "the validation step returns no scores, and calls no self(x) on (x, y)"
        elif found is None:
            self._reason = "batches hold no tensors that tell them apart"
        else:
            own = {name: scores[name].detach().float().cpu() for name in kinds}
            self._parts = {name: [*self._parts.get(name, []), own[name]] for name in kinds}
            self._sums.append(found)

    def _finish(self, trainer: pl.Trainer) -> None:
        self._unwatch()
        found = self._found(trainer)
        if trainer.is_global_zero:
            found.save(self.path)
        self._clear()

    def _found(self, trainer: pl.Trainer) -> Scores:
        values = {name: torch.cat(parts) for name, parts in self._parts.items()}
        sums = torch.stack(self._sums) if self._sums else torch.empty(0, dtype=torch.float64)
        reason = self._reason or ("" if values else "there was no validation batch")
        if trainer.world_size > 1:
            reason, values, sums = _gathered(trainer, reason, values, sums)
        if reason:
            return Scores.none(reason)
        logged = float(trainer.callback_metrics.get(self.metric, torch.nan))
        for name, scores in values.items():
            if abs(float(scores.double().mean()) - logged) <= 1e-4 * max(1.0, abs(logged)):
                return Scores(scores, sums, name)
        means = {name: round(float(scores.double().mean()), 4) for name, scores in values.items()}
        return Scores.none(f"no mean of scores is the logged {self.metric} = {logged:.4f}: {means}")

    # -- Lightning's hooks -----------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._start()

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Watch the module for one step."""
        self._watch(pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the samples of the batch."""
        self._collect(outputs, batch, dataloader_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the scores."""
        self._finish(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._start()

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Watch the module for one step."""
        self._watch(pl_module)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the samples of the batch."""
        self._collect(outputs, batch, dataloader_idx)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the scores."""
        self._finish(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the module as it was."""
        self._unwatch()


def _loader_of(metric: str) -> int | None:
    """The loader that a metric's name tells of, as Lightning writes it; ``None`` for all."""
    _, found, index = metric.rpartition("/dataloader_idx_")
    return int(index) if found and index.isdigit() else None


def _gathered(
    trainer: pl.Trainer, reason: str, values: dict[str, Tensor], sums: Tensor
) -> tuple[str, dict[str, Tensor], Tensor]:
    """What all processes have, one after the other; every process must take the same way."""
    sizes = [0, 0, 0] if reason else [len(values), len(next(iter(values.values()))), len(sums)]
    device = trainer.strategy.root_device
    shapes = trainer.strategy.all_gather(torch.tensor(sizes, device=device)).view(-1, 3)
    if bool((shapes != shapes[0]).any()) or not bool(shapes.all()):
        return reason or "processes have different numbers of samples", {}, sums
    stacked = torch.stack([*values.values()]).to(device)
    everything = trainer.strategy.all_gather(stacked).movedim(0, 1).flatten(1).cpu()
    # Bits, for devices that have no double precision.
    bits = trainer.strategy.all_gather(sums.view(torch.int64).to(device)).flatten().cpu()
    return "", dict(zip(values, everything, strict=True)), bits.view(torch.float64)
