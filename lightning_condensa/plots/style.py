"""What all figures share: a figure to draw on, scales, and how a trial's state looks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_condensa.search.result import SearchResult, Trial

#: Colours that can be told apart on white and on black.
COLORS = {
    "feasible": "tab:green",
    "infeasible": "tab:red",
    "aborted": "tab:orange",
    "diverged": "tab:purple",
    "failed": "tab:gray",
}
#: And shapes, for those who cannot tell the colours.
MARKERS = {"feasible": "o", "infeasible": "v", "aborted": "1", "diverged": "x", "failed": "+"}
GOLD, GOLD_EDGE = "gold", "#8a6d00"
#: More trials than this are not numbered: the numbers would hide each other.
MANY = 30


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, which needs no display.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install 'lightning-condensa[plots]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def canvas(axes: Axes | None, width: float = 6.4, height: float = 4.2) -> tuple[Figure, Axes]:
    """The axes to draw on and their figure; those of a new one of that size for ``None``."""
    if axes is None:
        figure = new_figure(width, height)
        return figure, figure.subplots()
    owner = axes.get_figure(root=True)
    assert owner is not None  # axes are made by a figure
    return owner, axes


def plain(text: str) -> str:
    r"""Text that matplotlib shows as it is, with no formulas between dollar signs.

    Example:
        >>> print(plain("fc.*$|conv.*$"))
        fc.*\$|conv.*\$
    """
    return text.replace("$", r"\$")


def short(value: float) -> str:
    """A number for a tick.

    Example:
        >>> [short(v) for v in (0.05, 200, 20000, 1.5e6, 0.0)]
        ['0.05', '200', '20k', '1.5M', '0']
    """
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def scale(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """Scale an axis for some values, by logarithm where they are positive and range far."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    known = list(values)
    low, high = min(known, default=0.0), max(known, default=0.0)
    if low > 0 and high > 5 * low:
        axes.set(**{f"{which}scale": "log"})
        near = high < 200 * low
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,)))
        axis.set_minor_formatter(NullFormatter())
        if near:
            axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def draw_trials(
    axes: Axes, trials: Sequence[Trial], x: Sequence[float], y: Sequence[float]
) -> None:
    """Draw a marker for each trial, with its number; hollow after a share of the training."""
    for trial, a, b in zip(trials, x, y, strict=True):
        # All are within the axes: the layout need not measure each, which takes most of the time.
        axes.plot(
            a,
            b,
            MARKERS[trial.state],
            color=COLORS[trial.state],
            fillstyle="full" if trial.fidelity == 1 else "none",
            gid=f"trial{trial.number}",
            in_layout=False,
        )
        if len(trials) <= MANY:
            axes.annotate(
                str(trial.number),
                (a, b),
                fontsize=7,
                xytext=(4, 4),
                textcoords="offset points",
                in_layout=False,
            )


def draw_best(axes: Axes, x: float, y: float) -> None:
    """Put a star under the best trial."""
    axes.plot(
        x, y, "*", markersize=16, color=GOLD, markeredgecolor=GOLD_EDGE, zorder=1, label="best"
    )


def draw_levels(axes: Axes, result: SearchResult) -> None:
    """Draw the dense model's metric and what is asked of it, as horizontal lines."""
    axes.axhline(result.baseline.metric, color="tab:gray", linestyle=":", label="dense")
    if result.level is None or result.target is None:
        return
    axes.axhline(result.level, color="tab:red", linestyle="--", label="tolerance")
    if result.target != result.level:
        axes.axhline(result.target, color="tab:orange", linestyle="-.", label="shows by itself")


def legend(axes: Axes, trials: Iterable[Trial], *, above: bool = False) -> None:
    """Explain what is drawn, and the states that occur; ``above`` the axes where they are full."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    trials = list(trials)
    present = {trial.state for trial in trials}
    for state, color in COLORS.items():
        if state in present:
            handles.append(Line2D([], [], color=color, marker=MARKERS[state], linestyle=""))
            labels.append(state)
    if any(trial.fidelity < 1 for trial in trials):
        hollow = Line2D([], [], color="gray", marker="o", fillstyle="none", linestyle="")
        handles.append(hollow)
        labels.append("less training")
    if not handles:
        return
    if above:
        axes.legend(
            handles,
            labels,
            fontsize=8,
            frameon=False,
            ncols=4,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            borderaxespad=0.1,
            columnspacing=1.0,
            handletextpad=0.2,
        )
    else:
        axes.legend(handles, labels, fontsize=8, framealpha=0.6).set_in_layout(False)


def focus(axes: Axes, result: SearchResult) -> None:
    """Choose the range of metrics to show, on the y axis: what decides, not a band's far end."""
    decisive = [t.metric for t in result.trials if t.metric is not None]
    decisive.append(result.baseline.metric)
    if result.level is not None and result.target is not None:
        decisive += [result.level, result.target, 3 * result.level - 2 * result.baseline.metric]
    margin = 0.1 * (max(decisive) - min(decisive)) or 0.01
    axes.set_ylim(min(decisive) - margin, max(decisive) + margin)
