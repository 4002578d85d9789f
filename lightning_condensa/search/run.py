"""One run of a search: the loop from proposal to record."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_condensa.schemes import Scheme
from lightning_condensa.search.overview import log_overview
from lightning_condensa.search.problem import Observation, Problem
from lightning_condensa.search.progress import SearchProgress
from lightning_condensa.search.result import Baseline, Curve, SearchResult, State, Trial, show
from lightning_condensa.search.store import DIVERGED_VIOLATION, Record, Store
from lightning_condensa.search.strategies import KnownObjectiveStrategy
from lightning_condensa.search.trial import Data, TrialJob, TrialOutcome, run_trial
from lightning_condensa.search.utility import Utility, known_objective, utilities

if TYPE_CHECKING:
    from lightning_condensa.search.condensa_search import CondensaSearch


class SearchRun:
    """Asks the strategy, hands out trials, records what comes back.

    Args:
        search: The search's settings.
        store: Its study.
        model: The starting point.
        data: The data.
        baseline: The uncompressed model's figures.
        progress: Where progress is shown.
    """

    def __init__(
        self,
        search: CondensaSearch,
        store: Store,
        model: pl.LightningModule,
        data: Data,
        baseline: Baseline,
        progress: SearchProgress,
    ) -> None:
        self.search, self.store, self.model, self.data = search, store, model, data
        self.baseline, self.progress = baseline, progress
        space = search.space
        self.candidates = space.candidates(model)
        self.points = torch.stack([space.coordinates(v) for v in self.candidates])
        values = known_objective(search.objective, space, model, self.candidates)
        self.known = values
        self.utility = Utility(search.objective, [*values, baseline.objective])
        self.problem = Problem(
            candidates=self.points,
            utility=utilities(self.utility, values),
            baseline=Observation(
                space.dense_point(),
                metric=search.sign * baseline.metric,
                variance=baseline.variance,
                utility=self.utility(baseline.objective),
            ),
            level=search.sign * search.level(baseline),
            noise_variance=baseline.variance,
            cliff=space.is_density and search.mode == "max" and 0 < baseline.metric <= 1,
            z=search.z,
        )
        self.distributions = space.distributions()

    def run(self) -> None:
        """Run trials until the budget is spent or nothing is left to try."""
        requeued = self.store.requeue_stale()
        if requeued:
            self.progress.print(f"trials {requeued} had been interrupted and are run again")
        while (done := len(self.store.records())) < self.search.max_trials:
            values = None if self.store.waiting() else self._propose()
            if values is None and not self.store.waiting():
                self.progress.print("every candidate has been tried")
                return
            number, values = self.store.start(values, self.distributions)
            scheme = self.search.space.scheme.at(values)
            self.progress.status(f"trial {number}: {show(values)}", done)
            job = self._job(number, scheme)
            self._record(number, values, job, self._execute(job))

    def _propose(self) -> dict[str, Any] | None:
        records = self.store.records()
        failed = [self._point(r) for r in records if r.outcome.status == "failed"]
        proposed = self.search.strategy.propose(
            self.problem,
            self._history(records),
            torch.stack(failed) if failed else None,
            q=1,
            seed=self.search.seed + len(records),
        )
        return self.candidates[proposed[0]] if proposed else None

    def _point(self, record: Record) -> Tensor:
        return self.search.space.coordinates(record.values)

    def _history(self, records: list[Record]) -> list[Observation]:
        history = []
        for record in records:
            outcome = record.outcome
            if outcome.status == "failed":
                continue
            diverged = outcome.status == "diverged" or outcome.metric is None
            history.append(
                Observation(
                    self._point(record),
                    metric=None if diverged else self.search.sign * float(outcome.metric or 0.0),
                    variance=self.baseline.variance,
                    utility=None if outcome.objective is None else self.utility(outcome.objective),
                    diverged=diverged,
                )
            )
        return history

    def _job(self, number: int, scheme: Scheme) -> TrialJob:
        search = self.search
        return TrialJob(
            number=number,
            module=self.model,
            data=self.data,
            scheme=scheme,
            trainer=search.trainer,
            callback=search.callback,
            metric=search.metric,
            mode=search.mode,
            objective=search.objective,
            directory=search.dirpath / "trials" / f"trial_{number:03d}",
            seed=search.seed + number,
            watchers=(self.progress,) if search.executor is None else (),
        )

    def _execute(self, job: TrialJob) -> TrialOutcome:
        if self.search.executor is None:
            return run_trial(job)
        future: Future[TrialOutcome] = self.search.executor.submit(run_trial, job)
        try:
            return future.result()
        except Exception as error:  # the worker itself died, or the job could not be sent
            return TrialOutcome("failed", message=f"{type(error).__name__}: {error}")

    def _record(
        self, number: int, values: dict[str, Any], job: TrialJob, outcome: TrialOutcome
    ) -> None:
        violation = DIVERGED_VIOLATION
        if outcome.status == "diverged":
            index = int(self.problem.nearest(self.search.space.coordinates(values)[None]))
            outcome = TrialOutcome(**{**outcome.to_dict(), "objective": self.known[index]})
        elif outcome.metric is not None:
            violation = self.problem.target - self.search.sign * outcome.metric
        self.store.finish(
            number,
            outcome,
            directory=str(job.directory),
            variance=self.baseline.variance,
            violation=violation,
        )
        result = self.result()
        trial = result.trials[-1]
        figures = (
            ""
            if trial.metric is None
            else (
                f"{result.metric} {trial.metric:.4f}, {result.objective} {trial.objective:,.5g} "
                f"{result.unit} ({result.ratio(trial):.1f} ×)"
            )
        )
        self.progress.print(
            f"trial {number}  {show(values)}  {figures or trial.message}  "
            f"{trial.state}  {trial.seconds:.0f} s"
        )
        log_overview(self.search.dirpath / "overview", result)

    def result(self) -> SearchResult:
        """The search as the study holds it."""
        search = self.search
        records = self.store.records()
        return SearchResult(
            baseline=self.baseline,
            trials=tuple(self._trial(r) for r in records),
            level=search.level(self.baseline),
            target=search.sign * self.problem.target,
            metric=search.metric,
            mode=search.mode,
            objective=search.objective.name,
            direction=search.objective.direction,
            unit=search.objective.unit,
            curve=self._curve(records),
            scheme=search.space.scheme.to_yaml(),
        )

    def _trial(self, record: Record) -> Trial:
        outcome = record.outcome
        state: State
        if outcome.status == "complete" and outcome.metric is not None:
            margin = self.search.sign * outcome.metric - self.problem.target
            state = "feasible" if margin >= 0 else "infeasible"
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

    def _curve(self, records: list[Record]) -> Curve | None:
        if len(self.search.space.dimensions) > 1 or self.points.shape[1] > 1:
            return None
        # Whatever strategy chose the trials, the plot shows what the default's surrogate believes.
        surrogate = KnownObjectiveStrategy().surrogate(
            self.problem, self._history(records), self.search.seed
        )
        center, lower, upper = (self.search.sign * t for t in surrogate.predict(self.points))
        if self.search.mode == "min":
            lower, upper = upper, lower
        (name,) = self.search.space.dimensions
        return Curve(
            dimension=name,
            values=[float(v[name]) for v in self.candidates],
            center=center.tolist(),
            lower=lower.tolist(),
            upper=upper.tolist(),
        )
