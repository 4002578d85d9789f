"""Several objectives: the front of the feasible trials, and how it grew."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_condensa.plots.style import canvas, draw_best, draw_trials, legend, plain, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_condensa.search.result import SearchResult


def plot_front(result: SearchResult, axes: Axes | None = None) -> Figure:
    """Every trial by the first two objectives, with the front of the feasible ones.

    Of more than two objectives the front's trials are marked, but not joined.

    Args:
        result: A search under several objectives.
        axes: Where to draw; a new figure where ``None``.

    Returns:
        The figure.

    Raises:
        ValueError: If the search had one objective.
        ModuleNotFoundError: Without matplotlib.
    """
    _need_several(result, "plot_front")
    figure, axes = canvas(axes)
    first, second = result.objectives[:2]
    front = sorted((t.objectives[first.name], t.objectives[second.name]) for t in result.pareto)
    if front:
        x, y = zip(*front, strict=True)
        if len(result.objectives) == 2:
            # Between two of the front, what is guaranteed is the worse of each.
            axes.step(
                x,
                y,
                where="post" if first.direction == "min" else "pre",
                color="tab:blue",
                label="Pareto front",
            )
        else:
            axes.plot(x, y, "o", mfc="none", ms=12, color="tab:blue", label="Pareto front")
    dense = [result.baseline.objectives[info.name] for info in (first, second)]
    axes.plot(*dense, "s", color="tab:gray", label="dense")
    shown = [t for t in result.trials if {first.name, second.name} <= t.objectives.keys()]
    points = [[t.objectives[info.name] for t in shown] for info in (first, second)]
    draw_trials(axes, shown, *points)
    best = result.best
    if best is not None:
        draw_best(axes, best.objectives[first.name], best.objectives[second.name])
    scale(axes, "x", [dense[0], *points[0]])
    scale(axes, "y", [dense[1], *points[1]])
    axes.set_xlabel(plain(f"{first.name} [{first.unit}]"))
    axes.set_ylabel(plain(f"{second.name} [{second.unit}]"))
    legend(axes, shown)
    return figure


def plot_hypervolume(result: SearchResult, axes: Axes | None = None) -> Figure:
    """The hypervolume of the feasible trials, after each trial.

    Args:
        result: A search under several objectives.
        axes: Where to draw; a new figure where ``None``.

    Returns:
        The figure.

    Raises:
        ValueError: If the search had one objective.
        ModuleNotFoundError: Without matplotlib.
    """
    from matplotlib.ticker import MaxNLocator

    _need_several(result, "plot_hypervolume")
    figure, axes = canvas(axes)
    axes.step([t.number for t in result.trials], result.hypervolume, where="post", marker=".")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("trial")
    axes.set_ylabel("hypervolume [product of ln(times better)]")
    return figure


def _need_several(result: SearchResult, name: str) -> None:
    if not result.several:
        raise ValueError(f"{name} needs several objectives, got {result.objective} alone")
