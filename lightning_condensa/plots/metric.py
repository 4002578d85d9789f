"""The metric along the one searched dimension: where the cliff is believed to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_condensa.plots.style import (
    COLORS,
    MARKERS,
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


def plot_metric(result: SearchResult, axes: Axes | None = None) -> Figure:
    """Trials with the surrogate's 95 % band, the tolerance and the believed cliff.

    Trials without a metric, diverged and failed ones, stand at the lower edge.

    Args:
        result: A search over one dimension.
        axes: Where to draw; a new figure where ``None``.

    Returns:
        The figure.

    Raises:
        ValueError: If the search had several dimensions, or a choice: there is no curve then.
        ModuleNotFoundError: Without matplotlib.
    """
    curve = result.curve
    if curve is None:
        raise ValueError(
            "result has no curve: the metric can be drawn along one Range only; "
            "plot_pareto and plot_groups show searches over several dimensions"
        )
    figure, axes = canvas(axes)
    axes.fill_between(curve.values, curve.lower, curve.upper, alpha=0.2, label="95 % band")
    axes.plot(curve.values, curve.center, label="believed")
    draw_levels(axes, result)
    _draw_cliff(axes, result)
    measured = [t for t in result.trials if t.metric is not None]
    at = [float(t.values[curve.dimension]) for t in measured]
    draw_trials(axes, measured, at, [t.metric for t in measured if t.metric is not None])
    best = result.best
    if best is not None and best.metric is not None:
        draw_best(axes, best.values[curve.dimension], best.metric)
    for trial in result.trials:
        if trial.metric is None:
            axes.plot(
                trial.values[curve.dimension],
                0.03,
                MARKERS[trial.state],
                color=COLORS[trial.state],
                transform=axes.get_xaxis_transform(),
                gid=f"trial{trial.number}",
            )
    scale(axes, "x", curve.values)
    axes.invert_xaxis()
    axes.set_xlabel(plain(f"{curve.dimension} (more compression →)"))
    axes.set_ylabel(plain(result.metric))
    focus(axes, result)
    legend(axes, result.trials)
    return figure


def crossing(values: Sequence[float], metrics: Sequence[float], level: float) -> float | None:
    """Where a curve first crosses a level, going by the order of its values.

    Between two values it is taken to be straight, over logarithms of positive values.

    Args:
        values: Densest first.
        metrics: The curve there.
        level: The level.

    Returns:
        The value, or ``None`` where the curve stays on the side on which it begins.

    Example:
        >>> round(crossing([1.0, 0.1, 0.01], [0.9, 0.9, 0.7], 0.8), 4)
        0.0316
    """
    for i in range(1, len(values)):
        before, after = metrics[i - 1] - level, metrics[i] - level
        if before * after < 0 or (after == 0 and before != 0):
            share = before / (before - after)
            a, b = values[i - 1], values[i]
            if min(a, b) > 0:
                return math.exp(math.log(a) + share * math.log(b / a))
            return a + share * (b - a)
    return None


def _draw_cliff(axes: Axes, result: SearchResult) -> None:
    curve = result.curve
    assert curve is not None
    if result.level is None:
        return
    cliff = crossing(curve.values, curve.center, result.level)
    if cliff is None:
        return
    ends = [crossing(curve.values, edge, result.level) for edge in (curve.lower, curve.upper)]
    known = sorted(end for end in ends if end is not None)
    between = f" ({known[0]:.3g} to {known[1]:.3g})" if len(known) == 2 else ""
    axes.axvline(
        cliff, color="tab:blue", linestyle=(0, (1, 1)), label=f"cliff at {cliff:.3g}{between}"
    )
