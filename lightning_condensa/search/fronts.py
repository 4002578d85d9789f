"""The front of a search under several objectives, and ways to pick from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_condensa.search import pareto
from lightning_condensa.search.trials import ObjectiveInfo, Trial

if TYPE_CHECKING:
    from lightning_condensa.search.result import SearchResult

__all__ = ["front", "hypervolumes", "knee", "pick"]


def front(result: SearchResult, trials: Sequence[Trial]) -> list[Trial]:
    """The feasible trials that no other beats in all objectives, the first objective's best first.

    Args:
        result: A search under several objectives.
        trials: Some of its trials.
    """
    able = [t for t in trials if _counts(result, t)]
    if not able:
        return []
    kept = pareto.front(_gains(result, able)).tolist()
    found = [t for t, own in zip(able, kept, strict=True) if own]
    downwards = result.direction == "max"
    return sorted(found, key=lambda t: t.objective or 0.0, reverse=downwards)


def hypervolumes(result: SearchResult) -> list[float]:
    """The hypervolume of the feasible trials after each trial, above the dense model.

    In logarithms of how many times better than dense: with two objectives, both twice as good,
    it is ``ln(2)²``.
    """
    rows: list[Tensor] = []
    volumes = []
    for trial in result.trials:
        if _counts(result, trial):
            rows.append(_gains(result, [trial])[0])
        reference = torch.zeros(len(result.objectives), dtype=torch.float64)
        volumes.append(pareto.hypervolume(torch.stack(rows), reference) if rows else 0.0)
    return volumes


def knee(result: SearchResult, trials: Sequence[Trial]) -> Trial | None:
    """The trial at which the front bends most; ``None`` where there is no front."""
    ends = front(result, trials)
    return ends[pareto.knee(_gains(result, ends))] if ends else None


def pick(result: SearchResult, budgets: Mapping[str, float]) -> Trial | None:
    """The best of the front within budgets.

    Args:
        result: A search.
        budgets: Name of an objective → what it may come to.

    Raises:
        ValueError: If a name is none of the search's objectives.
    """
    known = {name: info for info in result.objectives for name in (info.name, *info.short)}
    unknown = sorted(budgets.keys() - known.keys())
    if unknown or not budgets:
        raise ValueError(f"budgets must be for some of {sorted(known)}, got {unknown or 'none'}")
    bound = {known[name].name: (known[name], value) for name, value in budgets.items()}
    within = [
        trial
        for trial in result.pareto
        if all(_within(info, trial, value) for info, value in bound.values())
    ]
    if len(result.objectives) == 1:
        return result.best_metric(within)
    # The objectives that are not bounded decide; where all are, all do.
    free = [i for i, info in enumerate(result.objectives) if info.name not in bound]
    columns = free or list(range(len(result.objectives)))
    score = _gains(result, within)[:, columns].sum(dim=-1).tolist() if within else []
    return max(zip(score, within, strict=True), key=lambda pair: pair[0], default=(0, None))[1]


def _counts(result: SearchResult, trial: Trial) -> bool:
    complete = all(info.name in trial.objectives for info in result.objectives)
    return trial.state == "feasible" and trial.eligible and complete


def _within(info: ObjectiveInfo, trial: Trial, budget: float) -> bool:
    value = trial.objectives[info.name]
    return value <= budget if info.direction == "min" else value >= budget


def _gains(result: SearchResult, trials: Sequence[Trial]) -> Tensor:
    """How much better than dense each trial is in each objective, shape ``[N, m]``.

    Logarithms of ratios; of an objective that is not positive throughout, differences in units of
    the dense model's.
    """
    columns = []
    for info in result.objectives:
        dense = result.baseline.objectives[info.name]
        every = [t.objectives[info.name] for t in result.trials if info.name in t.objectives]
        positive = dense > 0 and all(value > 0 for value in every)
        sign = 1.0 if info.direction == "max" else -1.0
        own = [t.objectives[info.name] for t in trials]
        if positive:
            columns.append([sign * math.log(value / dense) for value in own])
        else:
            columns.append([sign * (value - dense) / (abs(dense) or 1.0) for value in own])
    return torch.tensor(columns, dtype=torch.float64).T
