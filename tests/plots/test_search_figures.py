"""What is drawn where."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_searches import accuracy, curve, one_dimension, result, several_dimensions, trial
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_condensa.plots import (
    plot_groups,
    plot_metric,
    plot_pareto,
    plot_search,
    plot_timeline,
    plot_trace,
    search_plots,
)
from lightning_condensa.plots.metric import crossing
from lightning_condensa.plots.timeline import lay_out


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points of every line with a label."""
    found = {line.get_label(): line for line in axes.get_lines()}
    return {k: list(zip(*v.get_data(), strict=True)) for k, v in found.items() if k[0] != "_"}


def markers(axes: Axes) -> dict[str, tuple[float, float]]:
    """Where each trial is drawn."""
    drawn = [line for line in axes.get_lines() if line.get_gid()]
    return {line.get_gid(): tuple(float(v[0]) for v in line.get_data()) for line in drawn}


def test_metric_shows_each_trial_the_levels_and_the_cliff() -> None:
    search = one_dimension(target=0.91)
    (axes,) = plot_metric(search).axes
    at = markers(axes)
    assert set(at) == {f"trial{n}" for n in range(8)}
    assert at["trial1"] == pytest.approx((0.03, accuracy(0.03)))
    assert at["trial7"] == pytest.approx((0.02, 0.03))  # no metric: at the lower edge
    drawn = lines(axes)
    assert drawn["tolerance"][0][1] == 0.90 and drawn["shows by itself"][0][1] == 0.91
    assert drawn["dense"][0][1] == 0.95
    assert drawn["best"] == [pytest.approx((0.046, accuracy(0.046)))]
    (cliff,) = [k for k in drawn if k.startswith("cliff at")]
    assert drawn[cliff][0][0] == pytest.approx(0.05 * 2.718281828**-0.1, rel=0.02)
    left, right = axes.get_xlim()
    assert left > right and axes.get_xscale() == "log"  # compression grows to the right


def test_cliff_of_a_minimized_metric_is_where_it_rises() -> None:
    search = one_dimension(mode="min", level=0.15, curve=curve(sign=-1.0))
    (axes,) = plot_metric(search).axes
    (cliff,) = [k for k in lines(axes) if k.startswith("cliff at")]
    assert lines(axes)[cliff][0][0] == pytest.approx(0.0452, rel=0.02)


def test_crossing_is_the_first_and_none_where_the_level_is_never_reached() -> None:
    assert crossing([4.0, 3.0, 2.0, 1.0], [1.0, 0.0, 1.0, 0.0], 0.5) == pytest.approx(12**0.5)
    assert crossing([1.0, 0.0], [1.0, 0.0], 0.25) == pytest.approx(0.25)
    assert crossing([1.0, 0.5], [1.0, 0.9], 0.5) is None


def test_metric_without_a_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="plot_pareto and plot_groups"):
        plot_metric(several_dimensions())


def test_trace_is_the_best_feasible_so_far() -> None:
    (axes,) = plot_trace(one_dimension()).axes
    best = dict(lines(axes)["best feasible"])
    sizes = {t.number: t.objective for t in one_dimension().trials}
    assert [best[n] for n in range(7)] == [
        sizes[n] for n in (0, 0, 0, 3, 4, 4, 4)
    ]  # 1 and 2 are smaller, and infeasible


@pytest.mark.parametrize(("direction", "where"), [("min", "post"), ("max", "pre")])
def test_pareto_front_is_a_staircase_of_what_is_attainable(direction: str, where: str) -> None:
    points = [(1000.0, 0.7), (2000.0, 0.9), (3000.0, 0.8), (4000.0, 0.95)]
    if direction == "max":
        points = [(5000.0 - x, y) for x, y in points]
    trials = [
        trial(n, {"a": 0.1, "b": 0.1}, y, x, "feasible" if y >= 0.9 else "infeasible")
        for n, (x, y) in enumerate(points)
    ]
    (axes,) = plot_pareto(result(trials, direction=direction)).axes
    front = sorted(p for i, p in enumerate(points) if i != 2)  # 2 is dominated by 1
    assert lines(axes)["Pareto front"] == front
    (line,) = [x for x in axes.get_lines() if x.get_label() == "Pareto front"]
    assert line.get_drawstyle() == f"steps-{where}"
    assert lines(axes)["best"] == [points[1]]
    assert len(markers(axes)) == 4


def test_groups_have_a_row_each_with_the_best_as_a_bar_and_options_counted() -> None:
    search = several_dimensions(groups=3, count=12)
    (axes,) = plot_groups(search).axes
    assert search.best is not None
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == list(search.trials[0].values)
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    best = [search.best.values[f"prune.layers.{g}.density"] for g in range(3)]
    assert ends == pytest.approx(best)
    texts = {t.get_text(): t for t in axes.texts}
    assert {"4  ×4", "8  ×4", "16  ×4", "int8  ×6", "float16  ×6"} <= set(texts)
    framed = [t.get_text() for t in axes.texts if t.get_bbox_patch() is not None]
    chosen = [str(v) for v in search.best.values.values() if not isinstance(v, float)]
    assert [text.split("  ×")[0] for text in framed] == chosen


def test_timeline_has_a_lane_for_each_trial_at_once_and_cuts_out_the_night() -> None:
    def ran(number: int, start: float, seconds: float) -> object:
        return trial(number, {"d": 0.1}, 0.9, 1.0, "feasible", started=start, seconds=seconds)

    trials = [ran(0, 100, 10), ran(1, 101, 4), ran(2, 106, 10), ran(3, 90000, 10)]
    bars, pauses = lay_out(trials)
    assert [(b.trial.number, b.lane) for b in bars] == [(0, 0), (1, 1), (2, 1), (3, 0)]
    assert [b.start for b in bars[:3]] == [0, 1, 6]
    assert 16 < bars[3].start < 40  # not a day later
    (pause,) = pauses
    assert pause.seconds == 90000 - 116 and 16 < pause.at < bars[3].start
    (axes,) = plot_timeline(result(trials)).axes
    drawn = {bar.get_gid(): bar for bar in axes.patches}
    assert [drawn[f"trial{n}"].get_width() for n in range(4)] == [10, 4, 10, 10]


def test_trials_of_unknown_start_are_left_out_of_the_timeline() -> None:
    trials = [trial(0, {"d": 0.1}, 0.9, 1.0, "feasible", started=None)]
    assert lay_out(trials) == ([], [])
    plot_timeline(result(trials))


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("make", [one_dimension, several_dimensions])
def test_every_figure_can_be_drawn_of_none_and_one_trial(make, count: int, tmp_path) -> None:
    search = make()
    search = replace(search, trials=search.trials[:count])
    plots = search_plots(search)
    first = "metric" if search.curve else "groups"
    assert list(plots) == [first, "trace", "pareto", "timeline"]
    for plot in plots.values():
        plot().savefig(tmp_path / "figure.png", dpi=30)


def test_several_figures_on_axes_of_ones_own() -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot_trace(one_dimension(), left) is figure
    assert plot_timeline(one_dimension(), right) is figure
    assert lines(left) and right.patches
    assert len(plot_search(several_dimensions()).axes) == 2


def test_names_with_dollars_are_no_formulas(tmp_path) -> None:
    name = r"prune.^a$|^\frac$.density"
    for plot in search_plots(one_dimension(name, metric="$acc$")).values():
        plot().savefig(tmp_path / "figure.png", dpi=30)
