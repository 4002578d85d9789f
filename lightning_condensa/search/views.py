"""What the study holds, as the user sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_condensa.search.formulation import Formulation
from lightning_condensa.search.problem import Observation
from lightning_condensa.search.result import Curve, State, Trial
from lightning_condensa.search.store import Record
from lightning_condensa.search.strategies import KnownObjectiveStrategy


def trial_of(record: Record, formulation: Formulation) -> Trial:
    """A trial, judged by the level that the search has now."""
    outcome = record.outcome
    state: State
    if outcome.status == "complete" and outcome.metric is not None:
        state = "feasible" if formulation.violation(outcome.metric) <= 0 else "infeasible"
    else:
        state = "failed" if outcome.status == "failed" else "diverged"
    own = {k: v for k, v in outcome.to_dict().items() if k != "status"}
    return Trial(
        number=record.number,
        values=record.values,
        state=state,
        variance=record.variance,
        directory=Path(record.directory),
        started=record.started,
        **own,
    )


def believed_curve(
    formulation: Formulation, history: Sequence[Observation], seed: int
) -> Curve | None:
    """The metric along the one dimension; ``None`` where there are several or it is a choice."""
    dimensions = formulation.space.dimensions
    if len(dimensions) > 1 or formulation.points.shape[1] > 1:
        return None
    # Whatever strategy chose the trials, the plot shows what the default's surrogate believes.
    surrogate = KnownObjectiveStrategy().surrogate(formulation.problem, history, seed)
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
