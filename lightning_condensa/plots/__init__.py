"""Figures, with matplotlib (the ``plots`` extra)."""

from lightning_condensa.plots.front import plot_front, plot_hypervolume
from lightning_condensa.plots.groups import plot_groups
from lightning_condensa.plots.metric import plot_metric
from lightning_condensa.plots.pareto import plot_pareto
from lightning_condensa.plots.search import plot_search, search_plots
from lightning_condensa.plots.timeline import plot_timeline
from lightning_condensa.plots.trace import plot_trace

__all__ = [
    "plot_front",
    "plot_groups",
    "plot_hypervolume",
    "plot_metric",
    "plot_pareto",
    "plot_search",
    "plot_timeline",
    "plot_trace",
    "search_plots",
]
