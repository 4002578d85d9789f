"""The search as a TensorBoard run of its own."""

from __future__ import annotations

import importlib.util
import logging
import time
from html import escape
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lightning_condensa.plots import search_plots
from lightning_condensa.search.report import trial_cells
from lightning_condensa.search.result import SearchResult
from lightning_condensa.search.trials import Trial

log = logging.getLogger(__name__)


class Overview:
    """The search in TensorBoard: scalars of every trial; from time to time all trials and figures.

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
            "search/hypervolume": result.hypervolume[-1] if result.several else None,
            "search/best_objective": None if result.best is None else result.best.objective,
            "search/best_metric": None if result.best is None else result.best.metric,
        }
        with SummaryWriter(str(self._directory)) as writer:
            for name, value in scalars.items():
                if value is not None:
                    writer.add_scalar(name, value, trial.number)

    def draw(self, result: SearchResult) -> None:
        """Log the outcome as text, and each figure where matplotlib is installed.

        Args:
            result: The search so far, with at least one trial.
        """
        self._drawn = time.monotonic()
        step = result.trials[-1].number
        text = f"{escape(result.summary())}\n\n{trial_cells(result).to_markdown()}"
        with SummaryWriter(str(self._directory)) as writer:
            writer.add_text("search/trials", text, step)
            if importlib.util.find_spec("matplotlib") is None:
                log.info("no figures in TensorBoard: pip install 'lightning-condensa[plots]'")
                return
            for name, plot in search_plots(result).items():
                writer.add_figure(f"search/{name}", plot(), step)
