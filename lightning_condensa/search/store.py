"""The study: a thin layer over Optuna's storage, so that nothing finished is ever lost.

The driver is the only writer. A trial is written when it is handed out (``RUNNING``) and when it
ends, with its raw metric, variance and objective, so that feasibility can be judged again under
another tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from lightning_condensa.objectives import Direction
from lightning_condensa.search.trial import TrialOutcome

#: Constraint of a diverged trial: infeasible by far, and finite, which the dashboard needs.
DIVERGED_VIOLATION = 1e6
_STATUS = "status"
_LOST = "lost"


@dataclass(frozen=True)
class Record:
    """A trial that ended, as the study holds it.

    Attributes:
        number: Its number in the study.
        values: The scheme's dimensions.
        outcome: What it found.
        directory: Where its files are.
        variance: Variance of its metric.
        started: When it was handed out, in seconds since 1970.
    """

    number: int
    values: dict[str, Any]
    outcome: TrialOutcome
    directory: str
    variance: float
    started: float | None


class Store:
    """An Optuna study with the facts that a search must not repeat.

    Args:
        storage: Database address, such as ``sqlite:///study.db``.
        study_name: Name of the study in it; an existing one is continued.
        direction: Direction of the objective.
    """

    def __init__(self, storage: str, study_name: str, direction: Direction) -> None:
        with _quiet():
            self._study = optuna.create_study(
                storage=storage,
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
        differing = [k for k in config if known.get(k) != config[k]]
        if differing:
            listed = "; ".join(
                f"{k}: {known.get(k)!r} there, {config[k]!r} here" for k in differing
            )
            raise ValueError(
                f"study {self._study.study_name!r} in the storage is of another search ({listed}); "
                "use another study_name, dirpath or storage"
            )

    def requeue_stale(self) -> list[int]:
        """Queue again what was running when the driver died; such trials count for nothing."""
        stale = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in stale:
            self._study.enqueue_trial(trial.params)
            self._set(trial._trial_id, _STATUS, _LOST)
            with _quiet():
                self._study.tell(trial.number, state=TrialState.FAIL)
        return [trial.number for trial in stale]

    def waiting(self) -> bool:
        """Whether a trial is queued."""
        return bool(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def start(
        self, values: Mapping[str, Any] | None, distributions: Mapping[str, BaseDistribution]
    ) -> tuple[int, dict[str, Any]]:
        """Begin a trial: the given values, or the queued ones where ``None``."""
        if values is not None:
            self._study.enqueue_trial(dict(values))
        trial = self._study.ask(fixed_distributions=dict(distributions))
        return trial.number, dict(trial.params)

    def finish(
        self,
        number: int,
        outcome: TrialOutcome,
        *,
        directory: str,
        variance: float,
        violation: float,
    ) -> None:
        """Record how a trial ended.

        Args:
            number: The trial.
            outcome: What it found; a diverged one needs an objective too.
            directory: Where its files are.
            variance: Variance of its metric.
            violation: How far the metric misses the level, at most 0 where it is feasible.
        """
        trial = next(t for t in self._study.get_trials(deepcopy=False) if t.number == number)
        for key, value in outcome.to_dict().items():
            self._set(trial._trial_id, key, value)
        self._set(trial._trial_id, "directory", directory)
        self._set(trial._trial_id, "variance", variance)
        if outcome.status == "failed":
            with _quiet():
                self._study.tell(number, state=TrialState.FAIL)
            return
        live = optuna.trial.Trial(self._study, trial._trial_id)
        live.set_constraint("metric", violation)
        # The dashboard still reads the attribute of Optuna 4.
        self._study._storage.set_trial_system_attr(trial._trial_id, "constraints", [violation])
        self._study.tell(number, outcome.objective)

    def records(self) -> list[Record]:
        """The trials that ended, in order; lost ones left out."""
        ended = self._study.get_trials(
            deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)
        )
        return [_record(t) for t in ended if t.user_attrs.get(_STATUS) not in (None, _LOST)]

    def _set(self, trial_id: int, key: str, value: Any) -> None:
        self._study._storage.set_trial_user_attr(trial_id, key, value)


def _record(trial: FrozenTrial) -> Record:
    attrs = trial.user_attrs
    fields = TrialOutcome.__dataclass_fields__
    return Record(
        number=trial.number,
        values=dict(trial.params),
        outcome=TrialOutcome(**{k: attrs[k] for k in fields if k in attrs}),
        directory=attrs["directory"],
        variance=attrs["variance"],
        started=None if trial.datetime_start is None else trial.datetime_start.timestamp(),
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
