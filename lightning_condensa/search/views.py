"""What the study holds, as the user sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_condensa.search.feasibility import FeasibilityModel
from lightning_condensa.search.formulation import Formulation
from lightning_condensa.search.problem import Observation
from lightning_condensa.search.result import Curve
from lightning_condensa.search.store import Record, Started
from lightning_condensa.search.strategies import KnownObjectiveStrategy
from lightning_condensa.search.trials import State, Trial


def further_runs(records: Sequence[Record]) -> dict[int, list[Record]]:
    """Trial → the runs that confirm it or not; failed ones say nothing."""
    runs: dict[int, list[Record]] = {}
    for record in records:
        if record.confirms is not None and record.outcome.status != "failed":
            runs.setdefault(record.confirms, []).append(record)
    return runs


def observations(formulation: Formulation, records: Sequence[Record]) -> dict[int, Observation]:
    """What each trial that did not fail has shown, by all runs of it.

    Those with a share of the training are left out where the strategy has no use for them.
    """
    runs = further_runs(records)
    return {
        r.number: formulation.seen(r, runs.get(r.number, ()))
        for r in records
        if r.outcome.status != "failed" and r.confirms is None and formulation.takes(r.fidelity)
    }


def trainings(trials: Iterable[Record | Started]) -> float:
    """How many trainings some trials take; confirmations do not count, and a share is a part."""
    return sum(t.fidelity for t in trials if t.confirms is None)


def trial_of(
    record: Record, formulation: Formulation, probability: float | None, runs: Sequence[Record]
) -> Trial:
    """A trial, judged by the level that the search has now, and by all runs of it.

    Where a confidence is asked for, by its probability; without one its measurement must show it.
    """
    outcome, noise = record.outcome, formulation.noise_of(record)
    state: State
    seen = formulation.seen(record, runs)
    if outcome.status in ("failed", "diverged"):
        state = outcome.status
    elif formulation.feasible(outcome, seen, probability):
        state = "feasible"  # also of an aborted one, by another tolerance
    else:
        aborted = outcome.status == "aborted" and formulation.goal.within(outcome.objective)
        state = "aborted" if aborted else "infeasible"
    own = {k: v for k, v in outcome.to_dict().items() if k != "status"}
    return Trial(
        number=record.number,
        values=record.values,
        state=state,
        variance=noise.variance,
        basis=noise.basis,
        directory=Path(record.directory),
        started=record.started,
        probability=probability,
        confirms=record.confirms,
        fidelity=record.fidelity,
        runs=tuple(r.outcome.metric for r in runs),
        objectives=outcome.objectives or formulation.named(outcome.objective),
        **own,
    )


@dataclass(frozen=True)
class Belief:
    """What the default's surrogate makes of all trials, whatever strategy chose them.

    Attributes:
        curve: The metric along the one dimension; ``None`` where there are several or it is a
            choice.
        probability: Trial → probability that its model truly keeps the level; empty where there is
            none.
    """

    curve: Curve | None
    probability: Mapping[int, float]


def belief(formulation: Formulation, records: Sequence[Record], seed: int) -> Belief:
    """Fit the surrogate to the trials that ended, with all of the training.

    What is certified rests on measurements alone, not on what less training tells of all of it.
    """
    history = observations(formulation, [r for r in records if r.fidelity == 1])
    problem = formulation.problem
    surrogate = KnownObjectiveStrategy().surrogate(problem, list(history.values()), seed)
    judged = history.items() if problem.budget is None else ()
    probability = {n: surrogate.certainty(seen, problem.level) for n, seen in judged}
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
