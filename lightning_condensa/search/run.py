"""One run of a search: the loop from proposal to record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytorch_lightning as pl

from lightning_condensa.objectives import Several
from lightning_condensa.objectives.named import short_names
from lightning_condensa.search.abort import AbortRule
from lightning_condensa.search.dispatch import Dispatcher
from lightning_condensa.search.executors import InProcess
from lightning_condensa.search.fidelity import Proposal
from lightning_condensa.search.formulation import Formulation
from lightning_condensa.search.noise import NoiseModel
from lightning_condensa.search.overview import Overview
from lightning_condensa.search.problem import Observation
from lightning_condensa.search.progress import SearchProgress
from lightning_condensa.search.result import SearchResult
from lightning_condensa.search.store import Record, Started, Store
from lightning_condensa.search.summary import line
from lightning_condensa.search.trial import Data, TrialJob, TrialOutcome, read_outcome
from lightning_condensa.search.trials import ObjectiveInfo, show
from lightning_condensa.search.views import (
    Belief,
    belief,
    further_runs,
    observations,
    trainings,
    trial_of,
)
from lightning_condensa.search.warm_start import WarmStart, nearest_denser

if TYPE_CHECKING:
    from lightning_condensa.search.condensa_search import CondensaSearch

#: Seeds of confirmations start so far from those of trials.
_CONFIRMATIONS = 1_000_000


class SearchRun:
    """Asks the strategy, hands out trials, records what comes back; the study's only writer.

    Args:
        search: The search's settings.
        store: Its study.
        model: The starting point.
        data: The data.
        formulation: The search as its strategy sees it.
        noise: Tells the noise of trials.
        progress: Where progress is shown.
    """

    def __init__(
        self,
        search: CondensaSearch,
        store: Store,
        model: pl.LightningModule,
        data: Data,
        formulation: Formulation,
        noise: NoiseModel,
        progress: SearchProgress,
    ) -> None:
        self.search, self.store, self.model, self.data = search, store, model, data
        self.formulation, self.noise, self.progress = formulation, noise, progress
        self.distributions = search.space.distributions()
        self.overview = Overview(search.dirpath / "overview")

    def run(self) -> SearchResult:
        """Run trials until the budget is spent or nothing is left to try."""
        before = len(self.store.records())
        self._resume()
        self._fly()
        result = self.result()
        if len(result.trials) > before:
            self.overview.draw(result)
        return result

    def _fly(self) -> None:
        search = self.search
        executor = search.executor or InProcess()
        with Dispatcher(executor, search.parallel, self.progress.print) as dispatcher:
            flying: dict[int, Started] = {}
            try:
                self._fill(dispatcher, flying)
                while dispatcher.running:
                    job, outcome = dispatcher.next()
                    trial = flying.pop(job.number)
                    self._record(trial, outcome)
                    if not dispatcher.local:
                        self._fill(dispatcher, flying)  # workers do not wait for what is told
                    self._tell(trial)
                    self._fill(dispatcher, flying)
            finally:  # Ctrl-C, say: what has ended is kept, what runs is for the next time
                for job, outcome in dispatcher.ended():
                    self._record(flying.pop(job.number), outcome)

    def _fill(self, dispatcher: Dispatcher, flying: dict[int, Started]) -> None:
        while dispatcher.room and (trial := self._start(flying)):
            flying[trial.number] = trial
            self._show(flying)
            dispatcher.submit(self._job(trial, dispatcher.local))

    def _resume(self) -> None:
        requeued = []
        for trial in self.store.running():
            outcome = read_outcome(self._directory(trial.number), trial.stamp)
            if outcome is not None:  # it ended while nobody listened
                self._record(trial, outcome)
                self._tell(trial)
            else:
                self.store.requeue(trial)
                requeued.append(trial.number)
        if requeued:
            self.progress.print(f"trials {requeued} had been interrupted and are run again")

    def _start(self, flying: Mapping[int, Started]) -> Started | None:
        records = self.store.records()
        running = len(flying)
        left = self.search.max_trials - trainings(records) - trainings(flying.values())
        if left < 1 - 1e-9:
            return self._confirm(records, running)
        if self.store.waiting():
            return self.store.start(None, self.distributions)
        proposed = self._propose(records, left)
        if proposed is not None:
            return self.store.start(proposed.values, self.distributions, proposed.fidelity)
        confirming = self._confirm(records, running)
        if not running and confirming is None:
            self.progress.print(
                "every candidate has been tried"
                if self.search.goal.budget is None
                else "every candidate that may keep the budget has been tried"
            )
        return confirming

    def _confirm(self, records: list[Record], running: int) -> Started | None:
        """Run the best trial that has not been run again; one at a time, as the next depends."""
        spent = sum(r.confirms is not None for r in records)
        if running or spent >= self.search.confirm:
            return None
        if self.store.waiting():  # was interrupted
            return self.store.start(None, self.distributions)
        best = self._judged().best
        if best is None or best.runs:
            return None
        index = _CONFIRMATIONS + spent
        return self.store.confirm(best.number, best.values, index, self.distributions)

    def _propose(self, records: list[Record], left: float) -> Proposal | None:
        failed = [Proposal(r.values, r.fidelity) for r in records if r.outcome.status == "failed"]
        pending = [Proposal(t.values, t.fidelity) for t in self.store.pending()]
        return self.formulation.propose(
            self.search.strategy,
            self._history(records),
            [*failed, *pending],
            seed=self.search.seed + self.store.count(),
            trainings=left,
        )

    def _history(self, records: list[Record]) -> list[Observation]:
        return [*observations(self.formulation, records).values()]

    def _directory(self, number: int) -> Path:
        return self.search.dirpath / "trials" / f"trial_{number:03d}"

    def _job(self, trial: Started, local: bool) -> TrialJob:
        search = self.search
        start = self._warm_start(trial)
        return TrialJob(
            number=trial.number,
            module=self.model,
            data=self.data,
            scheme=search.space.scheme.at(trial.values),
            trainer=search.trainer,
            callback=search.callback,
            metric=search.metric,
            mode=search.mode,
            objective=self.formulation.objective,
            directory=self._directory(trial.number),
            seed=search.seed + trial.index,
            stamp=trial.stamp,
            watchers=(self.progress,) if local else (),
            recorder=search.recorder(self._directory(trial.number)),
            start=start,
            rule=self._abort_rule(trial, start is not None),
            fidelity=trial.fidelity,
        )

    def _warm_start(self, trial: Started) -> WarmStart | None:
        least = self.search.warm_start
        if not least:
            return None
        records = [r for r in self.store.records() if r.fidelity == 1]
        if trial.confirms is not None:  # it starts where the one to be confirmed did
            first = next(r for r in records if r.number == trial.confirms)
            records = [r for r in records if r.number == first.outcome.parent]
        return nearest_denser(self.search.space, trial.values, records, least)

    def _abort_rule(self, trial: Started, warm: bool) -> AbortRule | None:
        if not self.search.early_abort or trial.confirms is not None:
            return None
        told = self.formulation
        target = told.level
        if target is None:  # nothing to keep, but something to beat
            best = self._judged().best
            target = None if best is None else best.evidence
        if target is None:
            return None
        return AbortRule.learned(
            [r for r in self.store.records() if r.fidelity == trial.fidelity],
            warm,
            target=target,
            sign=told.sign,
            tolerance=told.small,
            variance=told.baseline.variance,
        )

    def _record(self, trial: Started, outcome: TrialOutcome) -> None:
        if outcome.status == "diverged":
            known = self.formulation.objective_at(trial.values)
            outcome = TrialOutcome(**{**outcome.to_dict(), "objective": known})
        directory = self._directory(trial.number)
        measured = outcome.metric is not None
        told = self.formulation
        noise = self.noise.of(directory) if measured else told.baseline.noise
        violation = told.violation(outcome.metric, outcome.objective, noise.variance)
        if trial.fidelity < 1:  # to Optuna, too, it cannot be the best
            violation = max(violation, 1 - trial.fidelity)
        self.store.finish(
            trial.number,
            outcome,
            directory=str(directory),
            noise=noise,
            value=outcome.objective if told.level is not None else outcome.metric,
            violation=violation,
            constraint="metric" if told.level is not None else "budget",
        )

    def _tell(self, trial: Started) -> None:
        result = self._judged()
        ended = next(t for t in result.trials if t.number == trial.number)
        self.progress.print(line(result, ended))
        self.overview.log(result, ended)
        if self.overview.due:
            self.overview.draw(self.result())

    def _show(self, flying: dict[int, Started]) -> None:
        running = "; ".join(f"trial {n}: {show(t.values)}" for n, t in flying.items())
        records = self.store.records()
        again = sum(r.confirms is not None for r in records)
        self.progress.status(running, int(trainings(records)) + again)

    def result(self) -> SearchResult:
        """The search as the study holds it."""
        return self._result(belief(self.formulation, self.store.records(), self.search.seed))

    def _judged(self) -> SearchResult:
        """The same with no more belief than it takes to say what is feasible."""
        if self.formulation.problem.z > 0:
            return self.result()
        return self._result(Belief(None, {}))

    def _result(self, held: Belief) -> SearchResult:
        search, formulation = self.search, self.formulation
        records = self.store.records()
        runs = further_runs(records)
        parts = search.objective.parts if isinstance(search.objective, Several) else ()
        first = parts[0] if parts else search.objective
        return SearchResult(
            baseline=formulation.baseline,
            trials=tuple(
                trial_of(r, formulation, held.probability.get(r.number), runs.get(r.number, ()))
                for r in records
            ),
            level=formulation.level,
            target=formulation.target(self._history(records)),
            budget=search.goal.budget,
            confidence=search.confidence,
            metric=search.metric,
            mode=search.mode,
            objective=first.name,
            direction=first.direction,
            unit=first.unit,
            objectives=tuple(
                ObjectiveInfo(part.name, part.direction, part.unit, short_names(part)[1:])
                for part in parts or (first,)
            ),
            curve=held.curve,
            scheme=search.space.scheme.to_yaml(),
        )
