"""The study: a thin layer over Optuna's storage, so that nothing finished is ever lost.

The driver is the only writer. A trial is written when it is handed out (``RUNNING``) and when it
ends, with its raw metric, variance and objective, so that feasibility can be judged again under
another tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lightning_condensa.objectives import Direction
from lightning_condensa.search.noise import Basis, Noise
from lightning_condensa.search.trial import MODEL_FILE, TrialOutcome

_JOURNAL = "journal:///"
_STATUS, _LOST = "status", "lost"
_VALUES, _INDEX, _CONFIRMS, _FIDELITY = "values", "index", "confirms", "fidelity"


@dataclass(frozen=True)
class Started:
    """A trial that has been handed out.

    Attributes:
        number: Its number in the study.
        index: Its place in the search, which the next try of a lost trial keeps: seeds follow from
            it, so that an interrupted search equals an undisturbed one.
        values: The scheme's dimensions.
        stamp: When it began.
        confirms: The trial of which it is another run, or ``None``.
        fidelity: Share of the training that it takes.
    """

    number: int
    index: int
    values: dict[str, Any]
    stamp: str
    confirms: int | None = None
    fidelity: float = 1.0


@dataclass(frozen=True)
class Record:
    """A trial that ended, as the study holds it.

    Attributes:
        number: Its number in the study.
        values: The scheme's dimensions.
        outcome: What it found.
        directory: Where its files are.
        variance: Variance of its metric.
        basis: From what that is known.
        started: When it was handed out, in seconds since 1970.
        confirms: The trial of which it is another run, or ``None``.
        fidelity: Share of the training that it took.
    """

    number: int
    values: dict[str, Any]
    outcome: TrialOutcome
    directory: str
    variance: float
    basis: Basis
    started: float | None
    confirms: int | None = None
    fidelity: float = 1.0

    @property
    def model(self) -> Path:
        """Its packed model."""
        return Path(self.directory) / MODEL_FILE


class Store:
    """An Optuna study with the facts that a search must not repeat.

    Args:
        storage: Database address, such as ``sqlite:///study.db``, ``journal:///study.log`` for
            Optuna's journal in a file, or an Optuna storage.
        study_name: Name of the study in it; an existing one is continued.
        direction: Direction of what is optimized.
    """

    def __init__(self, storage: str | BaseStorage, study_name: str, direction: Direction) -> None:
        with _quiet():
            self._study = optuna.create_study(
                storage=open_storage(storage),
                study_name=study_name,
                direction="minimize" if direction == "min" else "maximize",
                load_if_exists=True,
            )

    def get(self, key: str) -> Any:
        """A fact about the study, ``None`` where it was never set."""
        return self._study.user_attrs.get(key)

    def set(self, key: str, value: Any) -> None:
        """Keep a fact, plain data, with the study."""
        self._study.set_user_attr(key, value)

    def claim(self, config: Mapping[str, Any]) -> None:
        """Make sure the study is of this search.

        Raises:
            ValueError: If the study belongs to another search; names what differs.
        """
        known = self.get("config")
        if known is None:
            self.set("config", dict(config))
            return
        differing = [k for k in {**known, **config} if known.get(k) != config.get(k)]
        if differing:
            listed = "; ".join(
                f"{k}: {known.get(k)!r} there, {config.get(k)!r} here" for k in differing
            )
            raise ValueError(
                f"study {self._study.study_name!r} in the storage is of another search ({listed}); "
                "use another study_name, dirpath or storage"
            )

    def running(self) -> list[Started]:
        """The trials that have begun and not ended; when a search begins, its driver died."""
        return [_started(t) for t in self._trials(TrialState.RUNNING)]

    def requeue(self, trial: Started) -> None:
        """Queue a begun trial's point again; the trial itself counts for nothing."""
        if not any(t.index == trial.index for t in self._waiting()):  # died in doing this?
            self._enqueue(trial.values, trial.index, trial.confirms, trial.fidelity)
        self._set(self._id(trial.number), _STATUS, _LOST)
        with _quiet():
            self._study.tell(trial.number, state=TrialState.FAIL)

    def waiting(self) -> bool:
        """Whether a trial is queued."""
        return bool(self._waiting())

    def pending(self) -> list[Started]:
        """The trials that are queued or running."""
        return [*self._waiting(), *self.running()]

    def count(self) -> int:
        """Trials that ended, run or are queued; lost ones and confirmations left out."""
        return sum(
            t.user_attrs.get(_STATUS) != _LOST and _CONFIRMS not in t.user_attrs
            for t in self._trials()
        )

    def start(
        self,
        values: Mapping[str, Any] | None,
        distributions: Mapping[str, BaseDistribution],
        fidelity: float = 1.0,
    ) -> Started:
        """Begin a trial: the given values, or the queued ones where ``None``.

        Args:
            values: The scheme's dimensions.
            distributions: Of the scheme.
            fidelity: Share of the training that it takes; a queued one has its own.
        """
        if values is not None:
            self._enqueue(values, self.count(), fidelity=fidelity)
        return self._ask(distributions)

    def confirm(
        self,
        confirms: int,
        values: Mapping[str, Any],
        index: int,
        distributions: Mapping[str, BaseDistribution],
    ) -> Started:
        """Begin another run of a trial that ended.

        Args:
            confirms: The trial.
            values: Its values.
            index: From which the seed follows.
            distributions: Of the scheme.
        """
        self._enqueue(values, index, confirms)
        return self._ask(distributions)

    def _ask(self, distributions: Mapping[str, BaseDistribution]) -> Started:
        number = self._study.ask(fixed_distributions=dict(distributions)).number
        return next(t for t in self.running() if t.number == number)

    def _enqueue(
        self,
        values: Mapping[str, Any],
        index: int,
        confirms: int | None = None,
        fidelity: float = 1.0,
    ) -> None:
        attrs = {_VALUES: dict(values), _INDEX: index}
        if confirms is not None:
            attrs[_CONFIRMS] = confirms
        if fidelity < 1:
            attrs[_FIDELITY] = fidelity
        # In one write, so that a driver that dies leaves either nothing or all.
        self._study.enqueue_trial(dict(values), user_attrs=attrs)

    def _waiting(self) -> list[Started]:
        return [_started(t) for t in self._trials(TrialState.WAITING)]

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    def _id(self, number: int) -> int:
        return next(t._trial_id for t in self._trials() if t.number == number)

    def finish(
        self,
        number: int,
        outcome: TrialOutcome,
        *,
        directory: str,
        noise: Noise,
        value: float | None,
        violation: float,
        constraint: str = "metric",
    ) -> None:
        """Record how a trial ended.

        Args:
            number: The trial.
            outcome: What it found.
            directory: Where its files are.
            noise: Of its metric.
            value: What is optimized; to Optuna a trial without has failed.
            violation: How far it misses what is asked for, at most 0 where it is feasible.
            constraint: Name of what is asked for.
        """
        trial_id = self._id(number)
        facts = {**outcome.to_dict(), "directory": directory, **noise._asdict()}
        for key, fact in facts.items():
            self._set(trial_id, key, fact)
        if outcome.status == "failed" or value is None:
            with _quiet():
                self._study.tell(number, state=TrialState.FAIL)
            return
        set_violation(optuna.trial.Trial(self._study, trial_id), violation, constraint)
        self._study.tell(number, value)

    def records(self) -> list[Record]:
        """The trials that ended, in order; lost ones left out."""
        ended = self._trials(TrialState.COMPLETE, TrialState.FAIL)
        return [_record(t) for t in ended if t.user_attrs.get(_STATUS) not in (None, _LOST)]

    def _set(self, trial_id: int, key: str, value: Any) -> None:
        self._study._storage.set_trial_user_attr(trial_id, key, value)


def set_violation(trial: optuna.Trial, violation: float, constraint: str = "metric") -> None:
    """Tell a running trial's constraint: at most 0 where it is feasible."""
    trial.set_constraint(constraint, violation)
    # The dashboard still reads the attribute of Optuna 4.
    trial.storage.set_trial_system_attr(trial._trial_id, "constraints", [violation])


def open_storage(storage: str | BaseStorage) -> str | BaseStorage:
    """What Optuna takes for a storage; it has no address for a journal."""
    if isinstance(storage, str) and storage.startswith(_JOURNAL):
        return JournalStorage(JournalFileBackend(storage.removeprefix(_JOURNAL)))
    return storage


def _started(trial: FrozenTrial) -> Started:
    began = trial.datetime_start
    return Started(
        number=trial.number,
        index=trial.user_attrs[_INDEX],
        values=dict(trial.user_attrs[_VALUES]),
        stamp="" if began is None else began.isoformat(),
        confirms=trial.user_attrs.get(_CONFIRMS),
        fidelity=trial.user_attrs.get(_FIDELITY, 1.0),
    )


def _record(trial: FrozenTrial) -> Record:
    attrs = trial.user_attrs
    fields = TrialOutcome.__dataclass_fields__
    return Record(
        number=trial.number,
        values=dict(trial.params),
        outcome=TrialOutcome(**{k: attrs[k] for k in fields if k in attrs}),
        directory=attrs["directory"],
        variance=attrs["variance"],
        basis=attrs.get("basis", "binomial"),
        started=None if trial.datetime_start is None else trial.datetime_start.timestamp(),
        confirms=attrs.get(_CONFIRMS),
        fidelity=attrs.get(_FIDELITY, 1.0),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's own progress messages out of ours."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
