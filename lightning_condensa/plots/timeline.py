"""When each trial ran: how well the workers were used."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_condensa.plots.style import COLORS, GOLD_EDGE, MANY, canvas, legend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_condensa.search.result import SearchResult, Trial


@dataclass(frozen=True)
class Bar:
    """A trial's place in the timeline.

    Attributes:
        trial: The trial.
        lane: From 0; trials that ran at the same time have different ones.
        start: In seconds since the first trial, long pauses left out.
    """

    trial: Trial
    lane: int
    start: float


@dataclass(frozen=True)
class Pause:
    """A long time in which nothing ran, cut out of the timeline.

    Attributes:
        at: Where, in seconds since the first trial.
        seconds: How long.
    """

    at: float
    seconds: float


def plot_timeline(result: SearchResult, axes: Axes | None = None) -> Figure:
    """A bar for each trial, from its start to its end; trials at the same time in several lanes.

    Pauses in which nothing ran, such as a night between two calls of ``fit``, are cut out and
    marked.

    Args:
        result: A search.
        axes: Where to draw; a new figure where ``None``.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    bars, pauses = lay_out(result.trials)
    lanes = 1 + max((bar.lane for bar in bars), default=0)
    figure, axes = canvas(axes, 6.4, 1.6 + 0.4 * min(lanes, 16))
    length = max((bar.start + bar.trial.seconds for bar in bars), default=0.0) or 1.0
    unit, name = (3600, "h") if length > 7200 else (60, "min") if length > 300 else (1, "s")
    for bar in bars:
        best = bar.trial is result.best
        # What failed at once still has to be seen.
        width = max(bar.trial.seconds, 0.004 * length)
        axes.barh(
            bar.lane,
            width / unit,
            0.8,
            left=bar.start / unit,
            color=COLORS[bar.trial.state],
            edgecolor=GOLD_EDGE if best else "white",
            linewidth=2.5 if best else 0.5,
            gid=f"trial{bar.trial.number}",
        )
        if len(bars) <= MANY and width > 0.015 * length:
            axes.text(
                (bar.start + width / 2) / unit,
                bar.lane,
                str(bar.trial.number),
                ha="center",
                va="center",
                fontsize=7,
                color="white",
                clip_on=True,
                in_layout=False,
            )
    for pause in pauses:
        axes.axvline(pause.at / unit, color="tab:gray", linestyle="--", linewidth=1)
        axes.annotate(
            f"idle {_duration(pause.seconds)}",
            (pause.at / unit, 0.5),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="center",
            rotation=90,
            fontsize=7,
        )
    axes.set_xlim(-0.01 * length / unit, 1.02 * length / unit)
    axes.set_ylim(lanes - 0.4, -0.6)
    axes.set_yticks(range(lanes), [str(lane + 1) for lane in range(lanes)])
    axes.set_xlabel(f"time [{name}]" + (", without pauses" if pauses else ""))
    axes.set_ylabel("at once")
    legend(axes, [bar.trial for bar in bars], above=True)
    if not bars:
        axes.text(0.5, 0.5, "no trial", transform=axes.transAxes, ha="center", va="center")
    return figure


def lay_out(trials: Sequence[Trial]) -> tuple[list[Bar], list[Pause]]:
    """Place trials in lanes, and cut out pauses longer than two median trials.

    Trials whose start is not known are left out.
    """
    spans = sorted(
        ((t.started, t) for t in trials if t.started is not None),
        key=lambda span: (span[0], span[1].number),
    )
    if not spans:
        return [], []
    patience = 2 * statistics.median(t.seconds for _, t in spans)
    bars: list[Bar] = []
    pauses: list[Pause] = []
    ends: list[float] = []  # of each lane, in clock time
    origin = spans[0][0]
    for started, trial in spans:
        idle = started - max(ends, default=started)
        if idle > patience:
            keep = patience / 4  # a gap to draw the mark in
            origin += idle - keep
            pauses.append(Pause(started - origin - keep / 2, idle))
        lane = next((i for i, end in enumerate(ends) if end <= started), len(ends))
        ends[lane : lane + 1] = [started + trial.seconds]
        bars.append(Bar(trial, lane, started - origin))
    return bars, pauses


def _duration(seconds: float) -> str:
    """A length of time in its own unit.

    Example:
        >>> _duration(90), _duration(7200), _duration(200000)
        ('90 s', '2 h', '2.3 d')
    """
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds:.2g} s"
