"""Our strategies in a user's own ``study.optimize``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import optuna
import pytorch_lightning as pl
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.objectives import Objective
from lightning_condensa.schemes import Scheme
from lightning_condensa.search.budget import possible
from lightning_condensa.search.certification import margin_of
from lightning_condensa.search.fidelity import Proposal
from lightning_condensa.search.formulation import Formulation
from lightning_condensa.search.goal import Goal
from lightning_condensa.search.metrics import noise_variance
from lightning_condensa.search.problem import Observation
from lightning_condensa.search.space import SearchSpace
from lightning_condensa.search.store import set_violation
from lightning_condensa.search.strategies import strategy_for
from lightning_condensa.search.trial import Mode
from lightning_condensa.search.trials import Baseline

_METRIC, _OBJECTIVE = "condensa_metric", "condensa_objective"


class CondensaSampler(BaseSampler):
    """Proposes what :class:`~lightning_condensa.CondensaSearch` would, in a study of yours.

    In the objective function :meth:`suggest` gives the trial's scheme, and :meth:`report` takes
    what training made of it: it sets the constraint ``metric ≥ baseline − tolerance``, so that
    ``study.best_trial`` is feasible, and returns the value to be returned. With ``budget`` the
    constraint is on the objective, and the value is the metric. Trials that run
    elsewhere at the same time (``n_jobs``, several processes on one storage) are taken into
    account, failed ones are not proposed again, and the study stops when nothing is left to try.

    Args:
        scheme: With a ``Range`` or ``Choice`` in it.
        model: The uncompressed module, whose structure decides what can be tried.
        objective: What is optimized, or kept within the budget. The study's direction must be its
            direction; with a budget, ``mode``.
        baseline: The uncompressed model's metric.
        tolerance: How far the metric may be from it; either this or ``budget``.
        mode: Whether more (``"max"``) or less of the metric is better.
        method: As of ``CondensaSearch``.
        samples: Validation samples that the metric is measured on, for its noise.
        metric_std: Its standard deviation, where that is known.
        confidence: Probability with which the winner shall be feasible; not with a budget.
        budget: What the objective may come to.
        seed: Of the proposals.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optuna, torch, pytorch_lightning as pl
        >>> from lightning_condensa import MemoryFootprint, Prune, Range
        >>> class Net(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(64, 64)
        >>> net = Net()
        >>> sampler = CondensaSampler(
        ...     Prune(Range(0.01, 1.0, log=True)), net, MemoryFootprint(), baseline=0.98,
        ...     tolerance=0.01,
        ... )
        >>> def objective(trial):
        ...     compressed = CompressedModel.compress(net, sampler.suggest(trial))  # or train
        ...     return sampler.report(trial, compressed, metric=0.98)
        >>> study = optuna.create_study(sampler=sampler)
        >>> study.optimize(objective, n_trials=2)
        >>> study.best_trial.constraints["metric"] <= 0
        True
    """

    def __init__(
        self,
        scheme: Scheme,
        model: pl.LightningModule,
        objective: Objective,
        baseline: float,
        tolerance: float | None = None,
        *,
        budget: float | None = None,
        mode: Mode = "max",
        method: str = "auto",
        samples: int | None = None,
        metric_std: float | None = None,
        confidence: float | None = None,
        seed: int = 0,
    ) -> None:
        goal = Goal(mode, objective.direction, tolerance, budget)
        if budget is not None and confidence is not None:
            raise ValueError(f"confidence={confidence!r} needs a tolerance, got budget={budget!r}")
        if not math.isfinite(baseline):
            raise ValueError(f"baseline must be a finite number, got {baseline!r}")
        self._seed = seed
        self._strategy = strategy_for(method, goal)
        value = objective(CompressedModel(model, {}, scheme))
        dense = Baseline(
            metric=baseline,
            variance=noise_variance(baseline, samples, goal.small(baseline))
            if metric_std is None
            else metric_std**2,
            objective=value,
            samples=samples,
            objectives={objective.name: value},
        )
        self._formulation = Formulation(
            SearchSpace(scheme), objective, model, dense, goal, margin_of(confidence)
        )
        self._independent = RandomSampler(seed=seed)

    def suggest(self, trial: optuna.Trial) -> Scheme:
        """The scheme that a trial shall try; its dimensions become the trial's parameters."""
        values: dict[str, Any] = {}
        for name, distribution in self._formulation.space.distributions().items():
            if isinstance(distribution, CategoricalDistribution):
                values[name] = trial.suggest_categorical(name, distribution.choices)
            else:
                assert isinstance(distribution, FloatDistribution)  # what a Range becomes
                low, high = distribution.low, distribution.high
                values[name] = trial.suggest_float(name, low, high, log=distribution.log)
        return self._formulation.space.scheme.at(values)

    def report(self, trial: optuna.Trial, compressed: CompressedModel, metric: float) -> float:
        """Record what came out of a trial.

        Args:
            trial: The running trial.
            compressed: Its model.
            metric: Its metric; not finite where training diverged.

        Returns:
            The objective, for the objective function to return; with a budget the metric. One that
            is not finite fails the trial, which is still known to have diverged.
        """
        known = metric if math.isfinite(metric) else None
        objective = float(self._formulation.objective(compressed))
        trial.set_user_attr(_METRIC, known)
        trial.set_user_attr(_OBJECTIVE, objective)
        violation = self._formulation.violation(known, objective)
        if self._formulation.goal.budget is not None:
            set_violation(trial, violation, "budget")
            return metric
        set_violation(trial, violation)
        return objective

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The scheme's open dimensions."""
        return self._formulation.space.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next values; those of the densest candidate where all have been tried."""
        proposed = self._propose(study, trial.number)
        return self._formulation.candidates[0] if proposed is None else proposed

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Parameters that the scheme has not: at random."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Stop ``study.optimize`` when nothing is left to try."""
        seen, taken = self._seen(study, trial.number)
        ended = {tuple(trial.params.values())} | {
            tuple(v.values()) for v in [*(v for v, _ in seen), *taken]
        }
        history = [observation for _, observation in seen]
        left = int(possible(self._formulation.problem, history).sum())
        if len(ended) >= left and study._thread_local.in_optimize_loop:
            study.stop()

    def _propose(self, study: Study, number: int) -> dict[str, Any] | None:
        seen, taken = self._seen(study, number)
        history = [observation for _, observation in seen]
        seed = self._seed + number
        points = [Proposal(values) for values in taken]
        proposed = self._formulation.propose(self._strategy, history, points, seed)
        return None if proposed is None else dict(proposed.values)

    def _seen(
        self, study: Study, number: int
    ) -> tuple[list[tuple[dict[str, Any], Observation]], list[dict[str, Any]]]:
        """Finished evaluations, and values that run or have failed."""
        names = set(self._formulation.space.dimensions)
        seen: list[tuple[dict[str, Any], Observation]] = []
        taken: list[dict[str, Any]] = []
        for other in study.get_trials(deepcopy=False):
            values = {k: v for k, v in other.params.items() if k in names}
            if other.number == number or set(values) != names:
                continue
            if other.state.is_finished() and _METRIC in other.user_attrs:
                metric = other.user_attrs[_METRIC]
                known = other.user_attrs.get(_OBJECTIVE, other.value)
                objective = None if metric is None else known
                observation = self._formulation.observation(values, metric, objective)
                seen.append((values, observation))
            else:
                taken.append(values)
        return seen, taken
