"""What the study holds, as the user sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_condensa.search.feasibility import FeasibilityModel
from lightning_condensa.search.formulation import Formulation
from lightning_condensa.search.result import Curve, State, Trial
from lightning_condensa.search.store import Record
from lightning_condensa.search.strategies import KnownObjectiveStrategy


def trial_of(record: Record, formulation: Formulation, probability: float | None) -> Trial:
    """A trial, judged by the level that the search has now."""
    outcome = record.outcome
    state: State
    if outcome.status in ("failed", "diverged"):
        state = outcome.status
    elif formulation.violation(outcome.metric) <= 0:  # also of an aborted one, by another tolerance
        state = "feasible"
    else:
        state = "aborted" if outcome.status == "aborted" else "infeasible"
    own = {k: v for k, v in outcome.to_dict().items() if k != "status"}
    return Trial(
        number=record.number,
        values=record.values,
        state=state,
        variance=record.variance,
        directory=Path(record.directory),
        started=record.started,
        probability=probability,
        **own,
    )


@dataclass(frozen=True)
class Belief:
    """What the default's surrogate makes of all trials, whatever strategy chose them.

    Attributes:
        curve: The metric along the one dimension; ``None`` where there are several or it is a
            choice.
        probability: Trial → probability that its model truly keeps the level.
    """

    curve: Curve | None
    probability: Mapping[int, float]


def belief(formulation: Formulation, records: Sequence[Record], seed: int) -> Belief:
    """Fit the surrogate to the trials that ended."""
    history = {r.number: formulation.seen(r) for r in records if r.outcome.status != "failed"}
    problem = formulation.problem
    surrogate = KnownObjectiveStrategy().surrogate(problem, list(history.values()), seed)
    probability = {n: surrogate.certainty(seen, problem.level) for n, seen in history.items()}
    return Belief(_curve(formulation, surrogate), probability)


def _curve(formulation: Formulation, surrogate: FeasibilityModel) -> Curve | None:
    dimensions = formulation.space.dimensions
    if len(dimensions) > 1 or formulation.points.shape[1] > 1:
        return None
    center, lower, upper = (formulation.sign * t for t in surrogate.predict(formulation.points))
    if formulation.sign < 0:
        lower, upper = upper, lower
    (name,) = dimensions
    return Curve(
        dimension=name,
        values=[float(v[name]) for v in formulation.candidates],
        center=center.tolist(),
        lower=lower.tolist(),
        upper=upper.tolist(),
    )
