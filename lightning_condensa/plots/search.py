"""The search at a glance, and all its figures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from lightning_condensa.plots.front import plot_front, plot_hypervolume
from lightning_condensa.plots.groups import plot_groups
from lightning_condensa.plots.metric import plot_metric
from lightning_condensa.plots.pareto import plot_pareto
from lightning_condensa.plots.style import new_figure
from lightning_condensa.plots.timeline import plot_timeline
from lightning_condensa.plots.trace import plot_trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_condensa.search.result import SearchResult


def plot_search(result: SearchResult) -> Figure:
    """Two panels: metric against the searched value, and the objective by trial.

    For several dimensions the first shows the Pareto front instead. Under several objectives the
    two are their front and its hypervolume.

    Args:
        result: A search.

    Returns:
        A figure, which needs no display.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    if result.several:
        plot_front(result, left)
        plot_hypervolume(result, right)
        return figure
    (plot_pareto if result.curve is None else plot_metric)(result, left)
    plot_trace(result, right)
    return figure


def search_plots(result: SearchResult) -> dict[str, Callable[[], Figure]]:
    """Every figure that applies to a search, by name, to be drawn when called.

    Args:
        result: A search.

    Returns:
        ``metric`` for one dimension or ``groups`` for others, then ``trace``, ``pareto`` and
        ``timeline``; under several objectives ``front`` and ``hypervolume`` instead of the first
        two of these.
    """
    first = {"groups": plot_groups} if result.curve is None else {"metric": plot_metric}
    if result.several:
        gained = {"front": plot_front, "hypervolume": plot_hypervolume}
    else:
        gained = {"trace": plot_trace, "pareto": plot_pareto}
    others = {**gained, "timeline": plot_timeline}
    return {name: partial(plot, result) for name, plot in (first | others).items()}
