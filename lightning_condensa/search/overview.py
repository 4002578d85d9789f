"""The search as a TensorBoard run of its own."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lightning_condensa.search.result import SearchResult, Trial

log = logging.getLogger(__name__)


def log_overview(directory: Path, result: SearchResult, trial: Trial) -> None:
    """Scalars of a trial, and the search's figure where matplotlib is installed.

    Args:
        directory: Of the TensorBoard run.
        result: The search so far.
        trial: The trial that has ended.
    """
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
        if importlib.util.find_spec("matplotlib") is None:
            log.info("no figure in TensorBoard: pip install 'lightning-condensa[plots]'")
        else:
            writer.add_figure("search/overview", result.plot(), trial.number)
    finally:
        writer.close()
