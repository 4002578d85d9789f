"""What was gained so far, trial by trial."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_condensa.plots.style import canvas, draw_trials, legend, plain, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_condensa.search.result import SearchResult, Trial


def plot_trace(result: SearchResult, axes: Axes | None = None) -> Figure:
    """The objective of every trial, and the best feasible one so far.

    In a budget it is the metric of every trial, and the best so far within the budget.

    Args:
        result: A search.
        axes: Where to draw; a new figure where ``None``.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    from matplotlib.ticker import MaxNLocator

    def value(trial: Trial) -> float | None:
        return trial.objective if result.budget is None else trial.metric

    figure, axes = canvas(axes)
    trace: list[tuple[int, float]] = []
    shown = [(t, found) for t in result.trials if (found := value(t)) is not None]
    for i, (trial, _) in enumerate(shown):
        best = result.best_of([t for t, _ in shown[: i + 1]])
        found = None if best is None else value(best)
        if found is not None:
            trace.append((trial.number, found))
    numbers = [float(t.number) for t, _ in shown]
    draw_trials(axes, [t for t, _ in shown], numbers, [found for _, found in shown])
    if trace:
        x, y = zip(*trace, strict=True)
        axes.step(x, y, where="post", label="best feasible")
    dense = result.baseline.objective if result.budget is None else result.baseline.metric
    axes.axhline(dense, color="tab:gray", linestyle=":", label="dense")
    scale(axes, "y", [dense, *(found for _, found in shown)])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("trial")
    name = f"{result.objective} [{result.unit}]" if result.budget is None else result.metric
    axes.set_ylabel(plain(name))
    legend(axes, [t for t, _ in shown])
    return figure
