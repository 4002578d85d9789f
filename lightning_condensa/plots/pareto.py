"""Metric against objective: what else could be had."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_condensa.plots.style import (
    canvas,
    draw_best,
    draw_levels,
    draw_trials,
    focus,
    legend,
    plain,
    scale,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_condensa.search.result import SearchResult


def plot_pareto(result: SearchResult, axes: Axes | None = None) -> Figure:
    """The metric of every trial against its objective, with the Pareto front.

    The front is drawn as stairs: the best metric evaluated for each bound on the objective.

    Args:
        result: A search.
        axes: Where to draw; a new figure where ``None``.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    figure, axes = canvas(axes)
    front = sorted(
        (t.objective, t.metric)
        for t in result.pareto
        if t.objective is not None and t.metric is not None
    )
    if front:
        x, y = zip(*front, strict=True)
        axes.step(
            x,
            y,
            where="post" if result.direction == "min" else "pre",
            color="tab:blue",
            label="Pareto front",
        )
    draw_levels(axes, result)
    if result.budget is not None:
        axes.axvline(result.budget, color="tab:red", linestyle="--", label="budget")
    dense = result.baseline
    axes.plot(dense.objective, dense.metric, "s", color="tab:gray")
    scored = [
        (t, t.objective, t.metric)
        for t in result.trials
        if t.objective is not None and t.metric is not None
    ]
    objectives = [objective for _, objective, _ in scored]
    draw_trials(axes, [t for t, _, _ in scored], objectives, [metric for _, _, metric in scored])
    best = result.best
    if best is not None and best.objective is not None and best.metric is not None:
        draw_best(axes, best.objective, best.metric)
    asked = [] if result.budget is None else [result.budget]
    scale(axes, "x", [dense.objective, *objectives, *asked])
    axes.set_xlabel(plain(f"{result.objective} [{result.unit}]"))
    axes.set_ylabel(plain(result.metric))
    focus(axes, result)
    legend(axes, [t for t, _, _ in scored])
    return figure
