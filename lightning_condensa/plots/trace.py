"""What was gained so far, trial by trial."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_condensa.plots.style import canvas, draw_trials, legend, plain, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_condensa.search.result import SearchResult


def plot_trace(result: SearchResult, axes: Axes | None = None) -> Figure:
    """The objective of every trial, and the best feasible one so far.

    Args:
        result: A search.
        axes: Where to draw; a new figure where ``None``.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = canvas(axes)
    better = max if result.direction == "max" else min
    best: float | None = None
    trace: list[tuple[int, float]] = []
    shown = [(t, t.objective) for t in result.trials if t.objective is not None]
    for trial, objective in shown:
        if trial.state == "feasible" and trial.confirms is None:
            best = objective if best is None else better(best, objective)
        if best is not None:
            trace.append((trial.number, best))
    numbers = [float(t.number) for t, _ in shown]
    draw_trials(axes, [t for t, _ in shown], numbers, [value for _, value in shown])
    if trace:
        x, y = zip(*trace, strict=True)
        axes.step(x, y, where="post", label="best feasible")
    axes.axhline(result.baseline.objective, color="tab:gray", linestyle=":", label="dense")
    scale(axes, "y", [result.baseline.objective, *(value for _, value in shown)])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("trial")
    axes.set_ylabel(plain(f"{result.objective} [{result.unit}]"))
    legend(axes, [t for t, _ in shown])
    return figure
