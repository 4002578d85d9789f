"""Several dimensions at once: how far each group of layers was compressed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lightning_condensa.plots.style import (
    COLORS,
    GOLD,
    GOLD_EDGE,
    MARKERS,
    canvas,
    legend,
    plain,
    scale,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_condensa.search.result import SearchResult

_ROW = 0.34  # inches


def plot_groups(result: SearchResult, axes: Axes | None = None) -> Figure:
    """A row per dimension: the values of all trials, the best trial's as a bar.

    Dimensions of a :class:`~lightning_condensa.Choice`, such as bits, stand below those of a
    :class:`~lightning_condensa.Range`, with their options and how many trials took each; the best
    trial's option is framed.

    Args:
        result: A search.
        axes: Where to draw; a new figure, as high as it needs, where ``None``.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    names = list(result.trials[0].values) if result.trials else []
    # Ranges give floats; a Choice of floats is as well drawn on the axis of numbers.
    ranges = [n for n in names if any(isinstance(t.values[n], float) for t in result.trials)]
    choices = [n for n in names if n not in ranges]
    longest = max(map(len, names), default=0)
    figure, axes = canvas(axes, 6.4 + 0.05 * longest, 1.4 + _ROW * max(len(names), 3))
    _draw_ranges(axes, result, ranges)
    for row, name in enumerate(choices, start=len(ranges)):
        _draw_choice(axes, result, row, name)
    if ranges and choices:
        axes.axhline(len(ranges) - 0.5, color="tab:gray", linewidth=0.8)
    rows = [*ranges, *choices]
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [plain(name) for name in rows])
    axes.tick_params(axis="y", length=0)
    legend(axes, result.trials if ranges else (), above=True)
    if result.best is not None:
        axes.set_title(f"best: trial {result.best.number}", fontsize=9, loc="right")
    return figure


def _draw_ranges(axes: Axes, result: SearchResult, names: list[str]) -> None:
    if not names:
        axes.set_xticks([])
        return
    best = result.best
    values = [float(t.values[n]) for t in result.trials for n in names]
    scale(axes, "x", values)
    low, high = min(values), max(values)
    if axes.get_xscale() == "log":
        axes.set_xlim(low / 1.3, high * 1.3)
    else:
        margin = 0.08 * (high - low) or abs(high) or 1.0
        axes.set_xlim(low - margin, high + margin)
    start = axes.get_xlim()[0]
    for row, name in enumerate(names):
        if best is not None:
            end = float(best.values[name])
            axes.barh(row, end - start, 0.5, left=start, color=GOLD, alpha=0.5, zorder=1)
            axes.annotate(
                f"{end:.3g}",
                (1.0, row),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                fontweight="bold",
                va="center",
                annotation_clip=False,
            )
        for trial in result.trials:
            axes.plot(
                float(trial.values[name]),
                row,
                MARKERS[trial.state],
                color=COLORS[trial.state],
                markersize=5,
                in_layout=False,
                alpha=1.0 if trial is best else 0.45,
                zorder=3,
            )
    kinds = {name.rpartition(".")[2] for name in names}
    axes.set_xlabel(plain(kinds.pop()) if len(kinds) == 1 else "value")


def _draw_choice(axes: Axes, result: SearchResult, row: int, name: str) -> None:
    taken = Counter(str(t.values[name]) for t in result.trials)
    best = None if result.best is None else str(result.best.values[name])
    for place, option in enumerate(sorted(taken, key=_natural)):
        chosen = option == best
        axes.text(
            (place + 0.5) / len(taken),
            row,
            plain(f"{option}  ×{taken[option]}"),
            transform=axes.get_yaxis_transform(),
            ha="center",
            va="center",
            in_layout=False,
            fontsize=8,
            fontweight="bold" if chosen else "normal",
            bbox={"facecolor": GOLD, "alpha": 0.5, "edgecolor": GOLD_EDGE, "pad": 2.5}
            if chosen
            else None,
        )


def _natural(option: str) -> tuple[float, str]:
    """Numbers by size, then names by alphabet."""
    try:
        return float(option), option
    except ValueError:
        return float("inf"), option
