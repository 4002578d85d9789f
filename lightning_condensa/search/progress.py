"""Progress of a search on a terminal: trials, and the steps of the running one."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class SearchProgress(pl.Callback):
    """Two Rich bars; also a Lightning callback that moves the second one.

    Where the output is no terminal, only a line per trial is printed.

    Args:
        total: Trials to run.
        enabled: Whether anything is shown.
    """

    def __init__(self, total: int, enabled: bool) -> None:
        self._enabled = enabled
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._trials = self._progress.add_task("search", total=total, note="")
        self._steps = self._progress.add_task("steps", total=None, note="", visible=False)

    def __enter__(self) -> SearchProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def status(self, note: str, completed: int) -> None:
        """Show how many trials ended, and what is happening."""
        self._progress.update(self._trials, completed=completed, note=note)

    def print(self, line: str) -> None:
        """A line above the bars."""
        if self._enabled:
            self._progress.console.print(line, highlight=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a trial's bar."""
        steps = trainer.estimated_stepping_batches
        self._progress.reset(self._steps, total=steps, visible=True, note="")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Advance it, with the figures that progress bars show."""
        self._progress.update(self._steps, completed=trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the metrics of the compressed model."""
        shown = {k: v for k, v in trainer.progress_bar_metrics.items() if k != "v_num"}
        note = "  ".join(f"{k} {float(v):.4g}" for k, v in shown.items())
        self._progress.update(self._steps, note=note)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hide the bar."""
        self._progress.update(self._steps, visible=False)
