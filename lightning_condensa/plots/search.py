"""The search at a glance: where the cliff is believed to be, and what was gained so far."""

from __future__ import annotations

from typing import Any

COLORS = {
    "feasible": "tab:green",
    "infeasible": "tab:red",
    "diverged": "black",
    "failed": "tab:gray",
}


def plot_search(result: Any) -> Any:
    """Two panels: metric against the searched value, and the objective by trial.

    The first shows the surrogate's 95 % band and the tolerance line; for several dimensions it
    shows the metric against the objective instead.

    Args:
        result: A :class:`~lightning_condensa.search.SearchResult`.

    Returns:
        A matplotlib ``Figure``, which needs no display.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install 'lightning-condensa[plots]'"
        ) from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_metric(left, result)
    _plot_trace(right, result)
    return figure


def _plot_metric(axes: Any, result: Any) -> None:
    curve = result.curve
    if curve is not None:
        axes.fill_between(curve.values, curve.lower, curve.upper, alpha=0.2, label="95 % band")
        axes.plot(curve.values, curve.center, label="believed")
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xlabel(f"{curve.dimension} (more compression →)")
    else:
        axes.set_xscale("log")
        axes.set_xlabel(f"{result.objective} [{result.unit}]")
    for trial in result.trials:
        if trial.metric is None:
            continue
        x = trial.objective if curve is None else trial.values[curve.dimension]
        axes.plot(x, trial.metric, "o", color=COLORS[trial.state])
        axes.annotate(
            str(trial.number),
            (x, trial.metric),
            fontsize=7,
            xytext=(3, 3),
            textcoords="offset points",
        )
    if result.best is not None:
        x = result.best.objective if curve is None else result.best.values[curve.dimension]
        axes.plot(
            x,
            result.best.metric,
            "*",
            markersize=16,
            color="gold",
            markeredgecolor="black",
            label="best",
            zorder=0,
        )
    axes.axhline(result.baseline.metric, color="gray", linestyle=":", label="dense")
    axes.axhline(result.level, color="tab:red", linestyle="--", label="tolerance")
    axes.set_ylabel(result.metric)
    # The band can reach far below: show what decides.
    decisive = [t.metric for t in result.trials if t.metric is not None]
    decisive += [
        result.baseline.metric,
        result.level,
        3 * result.level - 2 * result.baseline.metric,
    ]
    margin = 0.1 * (max(decisive) - min(decisive)) or 0.01
    axes.set_ylim(min(decisive) - margin, max(decisive) + margin)
    axes.legend(fontsize=8)


def _plot_trace(axes: Any, result: Any) -> None:
    best: float | None = None
    better = max if result.direction == "max" else min
    trace: list[tuple[int, float]] = []
    for trial in result.trials:
        if trial.objective is None:
            continue
        axes.plot(trial.number, trial.objective, "o", color=COLORS[trial.state])
        if trial.state == "feasible":
            best = trial.objective if best is None else better(best, trial.objective)
        if best is not None:
            trace.append((trial.number, best))
    if trace:
        axes.step(*zip(*trace, strict=True), where="post", label="best feasible")
    axes.axhline(result.baseline.objective, color="gray", linestyle=":", label="dense")
    axes.set_yscale("log" if result.baseline.objective > 0 else "linear")
    axes.set_xlabel("trial")
    axes.set_ylabel(f"{result.objective} [{result.unit}]")
    axes.legend(fontsize=8)
