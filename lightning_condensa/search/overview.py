"""The search as a TensorBoard run of its own."""

from __future__ import annotations

import importlib.util
import logging
from html import escape
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lightning_condensa.plots import search_plots
from lightning_condensa.search.report import trial_cells
from lightning_condensa.search.result import SearchResult

log = logging.getLogger(__name__)


def log_overview(directory: Path, result: SearchResult) -> None:
    """Scalars of the latest trial, the table of all, and figures where matplotlib is installed.

    Args:
        directory: Of the TensorBoard run.
        result: The search so far, with at least one trial.
    """
    trial = result.trials[-1]
    writer = SummaryWriter(str(directory))
    try:
        scalars = {
            f"search/{result.metric}": trial.metric,
            "search/objective": trial.objective,
            "search/best_objective": None if result.best is None else result.best.objective,
        }
        for name, value in scalars.items():
            if value is not None:
                writer.add_scalar(name, value, trial.number)
        draw_overview(writer, result)
    finally:
        writer.close()


def draw_overview(writer: SummaryWriter, result: SearchResult) -> None:
    """Log what shows the whole search: its outcome as text, and each of its figures.

    Args:
        writer: Of the TensorBoard run.
        result: The search so far, with at least one trial.
    """
    step = result.trials[-1].number
    text = f"{escape(result.summary())}\n\n{trial_cells(result).to_markdown()}"
    writer.add_text("search/trials", text, step)
    if importlib.util.find_spec("matplotlib") is None:
        log.info("no figure in TensorBoard: pip install 'lightning-condensa[plots]'")
        return
    for name, plot in search_plots(result).items():
        writer.add_figure(f"search/{name}", plot(), step)
