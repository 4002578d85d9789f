"""The outcome of a search for a terminal: a table of the trials, and a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from lightning_condensa.search.noise import noise_text
from lightning_condensa.search.trials import ObjectiveInfo, Trial, show

if TYPE_CHECKING:
    from lightning_condensa.search.result import SearchResult


def table(result: SearchResult) -> Table:
    """The trials as a Rich table."""
    asked = ", ".join(info.name for info in result.objectives) or result.objective
    if result.budget is not None:
        asked = f"best {result.metric}"
    found = Table(
        title=f"{asked} with {requirement(result)}",
        title_justify="left",
        caption=None if result.rescored is None else str(result.rescored),
        caption_justify="left",
    )
    names = list(result.trials[0].values) if result.trials else []
    further = result.objectives[1:]
    first = ["trial", *names, result.metric, f"{result.objective} [{result.unit}]", "× dense"]
    others = [f"{info.name} [{info.unit}]" for info in further]
    for column in (*first, *others):
        found.add_column(column, justify="right")
    found.add_column("P(feasible)", justify="right")
    found.add_column("state")
    found.add_column("time", justify="right")
    found.add_column("from", justify="right")
    for trial in result.trials:
        found.add_row(
            str(trial.number),
            *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in trial.values.values()),
            "" if trial.metric is None else f"{trial.metric:.4f}",
            "" if trial.objective is None else f"{trial.objective:,.5g}",
            "" if not trial.objective else f"{result.ratio(trial):.3g}",
            *(shown(trial, info) for info in further),
            "" if trial.probability is None else f"{trial.probability:.2f}",
            f"{trial.standing} {trial.message}"[:60].strip(),
            f"{trial.seconds:.0f} s",
            "dense" if trial.parent is None else str(trial.parent),
            style="bold green" if trial == result.best else None,
        )
    return found


def line(result: SearchResult, trial: Trial) -> str:
    """A trial that has ended, in a line."""
    figures = trial.message
    origin = "" if trial.parent is None else f", from trial {trial.parent}"
    if trial.metric is not None:
        figures = (
            f"{result.metric} {trial.metric:.4f}, {result.objective} {trial.objective:,.5g} "
            f"{result.unit} ({result.ratio(trial):.1f} ×)"
        )
    return (
        f"trial {trial.number}  {show(trial.values)}  {figures}  "
        f"{trial.standing}  {trial.seconds:.0f} s{origin}"
    )


def summary(result: SearchResult) -> str:
    """The outcome in a sentence."""
    best = result.best
    if best is not None and result.several:
        return _front(result, best)
    if best is not None:
        return (
            f"Trial {best.number} is best: {show(best.values)}; "
            f"{result.objective} {best.objective:,.5g} "
            f"{result.unit} ({result.ratio(best):.1f} × better than dense) at {result.metric} "
            f"{best.metric:.4f}, {_of(result)}{requirement(result)}{_sure(result, best)}"
            f"{_confirmed(result, best)}.{'' if result.rescored is None else f' {result.rescored}'}"
        )
    tried = sum(t.fidelity == 1 for t in result.trials)
    text = f"No trial is feasible: none of {tried} has {requirement(result)}."
    miss = result.nearest_miss
    if miss is not None and result.budget is not None:
        text += (
            f" Nearest miss: trial {miss.number} with {result.objective} {miss.objective:,.6g} at "
            f"{show(miss.values)}; raise the budget, or run more trials."
        )
    elif miss is not None:
        text += (
            f" Nearest miss: trial {miss.number} with {result.metric} {miss.evidence:.4f} at "
            f"{show(miss.values)}; widen the range, train longer, or raise the tolerance."
        )
    return text


def requirement(result: SearchResult) -> str:
    """What a trial must fulfil, in words."""
    if result.budget is not None:
        bound = "≤" if result.direction == "min" else "≥"
        return f"{result.objective} {bound} {result.budget:,.6g} {result.unit}".rstrip()
    assert result.level is not None  # without a budget there is one
    sign = "≥" if result.mode == "max" else "≤"
    sure = "" if result.confidence is None else f" with probability {result.confidence:g}"
    return f"{result.metric} {sign} {result.level:.4f}{sure} (dense: {result.baseline.metric:.4f})"


def shown(trial: Trial, info: ObjectiveInfo) -> str:
    """One of several objectives of a trial for people; empty where it is not known."""
    value = trial.objectives.get(info.name)
    return "" if value is None else f"{value:,.5g}"


def _front(result: SearchResult, best: Trial) -> str:
    numbers = [str(t.number) for t in result.pareto]
    ends = f"trial {numbers[0]} alone" if len(numbers) == 1 else f"trials {', '.join(numbers)}"
    at = ", ".join(
        f"{info.name} {shown(best, info)} {info.unit} (dense: "
        f"{result.baseline.objectives[info.name]:,.5g})".replace("  ", " ")
        for info in result.objectives
    )
    rescored = "" if result.rescored is None else f" {result.rescored}"
    return (
        f"The front is {ends}, of hypervolume {result.hypervolume[-1]:.3g}. "
        f"Trial {best.number} is its knee: {show(best.values)}; {at} "
        f"at {result.metric} {best.metric:.4f}, of {requirement(result)}{_sure(result, best)}"
        f"{_confirmed(result, best)}.{rescored}"
    )


def _of(result: SearchResult) -> str:
    return "of " if result.budget is None else "the best one with "


def _confirmed(result: SearchResult, best: Trial) -> str:
    if best.runs:
        return f"; confirmed by another run, mean {result.metric} {best.evidence:.4f}"
    if any(t.confirms is not None for t in result.trials):
        return "; not confirmed: the runs for that were spent on trials that did not hold"
    return ""


def _sure(result: SearchResult, trial: Trial) -> str:
    if trial.probability is None:
        return ""
    noise = noise_text(trial.variance, trial.basis, result.baseline.samples)
    return f"; feasible with probability {trial.probability:.2f}, its metric's noise {noise}"
