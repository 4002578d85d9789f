"""The search as a TensorBoard run of its own."""

from __future__ import annotations

import importlib.util
import logging
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lightning_condensa.search.result import SearchResult, Trial

log = logging.getLogger(__name__)


class Overview:
    """The search in TensorBoard: scalars of every trial, and from time to time its figure.

    Args:
        directory: Of the TensorBoard run.
        interval: Seconds between two figures; drawing takes longer than recording a trial.
    """

    def __init__(self, directory: Path, interval: float = 30.0) -> None:
        self._directory, self._interval = directory, interval
        self._drawn = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for a figure."""
        return time.monotonic() - self._drawn >= self._interval

    def log(self, result: SearchResult, trial: Trial) -> None:
        """Log a trial that has ended."""
        scalars = {
            f"search/{result.metric}": trial.metric,
            "search/objective": trial.objective,
            "search/best_objective": None if result.best is None else result.best.objective,
        }
        with SummaryWriter(str(self._directory)) as writer:
            for name, value in scalars.items():
                if value is not None:
                    writer.add_scalar(name, value, trial.number)

    def draw(self, result: SearchResult) -> None:
        """Log the figure, where matplotlib is installed; ``result`` must have a trial."""
        self._drawn = time.monotonic()
        if importlib.util.find_spec("matplotlib") is None:
            log.info("no figure in TensorBoard: pip install 'lightning-condensa[plots]'")
            return
        with SummaryWriter(str(self._directory)) as writer:
            writer.add_figure("search/overview", result.plot(), result.trials[-1].number)
