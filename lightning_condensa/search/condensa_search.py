"""Constrained Bayesian search over the open dimensions of a scheme."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage
from torch import nn

from lightning_condensa.objectives import Direction, Several, as_objective
from lightning_condensa.objectives.named import ObjectiveLike
from lightning_condensa.schemes import Scheme
from lightning_condensa.search.certification import margin_of
from lightning_condensa.search.dense import DenseModel, weights_hash
from lightning_condensa.search.dispatch import ExecutorLike
from lightning_condensa.search.fidelity import share_of_training
from lightning_condensa.search.formulation import Formulation
from lightning_condensa.search.goal import Goal
from lightning_condensa.search.noise import NoiseModel
from lightning_condensa.search.progress import SearchProgress
from lightning_condensa.search.recorder import ScoreRecorder
from lightning_condensa.search.result import SearchResult
from lightning_condensa.search.run import SearchRun
from lightning_condensa.search.scores import SCORES_FILE, PerSample
from lightning_condensa.search.space import SearchSpace
from lightning_condensa.search.store import Store
from lightning_condensa.search.strategies import strategy_for
from lightning_condensa.search.trial import Data, Mode

#: A killed driver's data loaders may outlive it, and its lock, for some seconds.
_LOCK_SECONDS = 10.0


class CondensaSearch:
    """Find how far a scheme can go: best objective with the metric within a tolerance.

    Or the other way round, with a ``budget``: best metric with the objective within it.

    The objective is known before training (bytes and FLOPs follow from the structure, latency is
    timed on an untrained copy); what is learned, from one Trainer run per trial, is where the
    metric falls off. The result is always a trial that was evaluated.

    Everything is kept in ``storage`` as soon as a trial ends: called again with the same
    arguments, :meth:`fit` goes on where it was interrupted, and ``max_trials`` and ``tolerance``
    (or ``budget``) may have changed.

    Args:
        scheme: A scheme with a :class:`~lightning_condensa.Range` or
            :class:`~lightning_condensa.Choice` in it.
        objective: What to optimize, or to keep within the budget: an
            :class:`~lightning_condensa.objectives.Objective`, the name of one (``"memory"``,
            ``"file_size"``, ``"parameters"``, ``"flops"``, ``"latency"`` or ``"throughput"``), or
            any callable ``(CompressedModel) -> float`` together with ``direction``. A list of
            several asks for a Pareto front of them.
        metric: A metric that the module logs in validation.
        mode: Whether more (``"max"``) or less (``"min"``) of the metric is better.
        tolerance: How far the metric may be from the uncompressed model's, in its own units.
            Either this or ``budget`` must be given.
        max_trials: Trainer runs, failed ones included, confirmations not.
        trainer: Keyword arguments of each trial's ``Trainer``; callbacks are copied per trial.
        callback: Keyword arguments of each trial's :class:`~lightning_condensa.CondensaCallback`.
        storage: Optuna storage or its address, ``journal:///FILE`` for a journal; an SQLite file in
            ``dirpath`` where ``None``.
        executor: Any ``concurrent.futures.Executor`` to run trials in, such as those of
            :mod:`lightning_condensa.search.executors`, or a function that makes one (and is called
            again should it break); this process where ``None``. The module and data must then be
            picklable, and ``dirpath`` a place that workers and this process share.
        method: ``"auto"``, ``"paper"`` (the published two-step method), ``"bisection"``,
            ``"random"`` or ``"grid"``; the second and third look for a tolerance's edge, and do
            not know of budgets.
        budget: What the objective may come to at most, in its own unit, such as ``1_000_000``
            bytes; at least, where it is maximized. The metric is then what is optimized.
        parallel: Trials at the same time; as many as the executor has workers where ``None``.
        direction: Direction of a callable objective.
        confidence: Probability with which a trial must truly keep the level to count as feasible,
            by what all trials say of it (:attr:`Trial.probability`). ``None`` asks for the measured
            metric only, as a search within a budget does.
        metric_std: Standard deviation of one measurement of the metric's distance to the
            uncompressed model's. Where ``None``, it comes from comparing both models sample by
            sample, or else from the number of validation samples.
        per_sample: For that comparison, a callable ``(outputs, batch) -> Tensor[n]`` from what
            ``validation_step`` returned to a score per sample whose mean is the metric. Not needed
            where ``validation_step`` returns such scores under the metric's name, or ``"logits"``
            and ``"target"``, or calls ``self(x)`` for logits on batches ``(x, y)``, and the metric
            is an accuracy, a cross entropy, or a squared or absolute error.
        confirm: Further runs, after ``max_trials``, that train the best trial again with another
            seed. If the mean of its runs is not feasible, the next best is run again, and so on;
            they end with the first one that holds, or after ``confirm`` runs. Kept in the study,
            and resumed, like trials.
        scan: Whether to validate the network compressed, without training, in one dimension at a
            time before the first trial: six passes over the validation data for a range, one for
            each option of a choice. The search then knows early which groups bear more, or along
            one density where the cliff may be; a scan that proves wrong is ignored. Kept in the
            study.
        warm_start: The least share of the training that a trial takes when it starts from the model
            of the nearest finished trial that is nowhere sparser, by a third of the weights in all
            at least, instead of from the dense model.
            It takes more where that one is far: of the way in ``−ln(density)`` what is still to go.
            0: every trial starts from the dense model and trains in full.
        early_abort: Whether to end a trial when its compressed metric, validated in training, can
            no longer reach the level, by the curves of earlier trials; never before four that
            started the same way, warm or not, have been trained to their end.
        fidelity: A share of the training, in whole epochs, such as 1/4, that the search may give
            a trial to learn where full ones are worth their cost; only these can be the best.
            ``max_trials`` counts trainings, of which such a trial is a part. For one density and a
            tolerance, with ``method="auto"``.
        seed: Seed of the search; the n-th point to be tried trains with ``seed + n``.
        dirpath: Where logs, models and the study go.
        study_name: Name of the study in the storage.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If an argument is out of range; names it and says what is accepted.

    Example:
        >>> from lightning_condensa import CondensaSearch, MemoryFootprint, Prune, Range
        >>> search = CondensaSearch(
        ...     Prune(Range(0.005, 1.0, log=True)),
        ...     objective=MemoryFootprint(),
        ...     metric="val_acc",
        ...     tolerance=0.01,
        ...     trainer={"max_epochs": 10},
        ... )  # then: result = search.fit(model, datamodule=data)
    """

    def __init__(
        self,
        scheme: Scheme,
        objective: ObjectiveLike | Sequence[ObjectiveLike],
        metric: str,
        mode: Mode = "max",
        tolerance: float | None = None,
        max_trials: int = 10,
        trainer: Mapping[str, Any] | None = None,
        callback: Mapping[str, Any] | None = None,
        storage: str | BaseStorage | None = None,
        executor: ExecutorLike | None = None,
        *,
        budget: float | None = None,
        method: str = "auto",
        parallel: int | None = None,
        direction: Direction | None = None,
        confidence: float | None = None,
        metric_std: float | None = None,
        per_sample: PerSample | None = None,
        confirm: int = 0,
        scan: bool = True,
        warm_start: float = 1 / 3,
        early_abort: bool = False,
        fidelity: float = 1.0,
        seed: int = 0,
        dirpath: str | Path = "condensa_search",
        study_name: str = "condensa",
        progress: bool = True,
    ) -> None:
        if not isinstance(scheme, Scheme):
            raise ValueError(f"scheme must be a scheme such as Prune(Range(…)), got {scheme!r}")
        if not isinstance(max_trials, int) or max_trials < 1:
            raise ValueError(f"max_trials must be an int >= 1, got {max_trials!r}")
        if not isinstance(confirm, int) or isinstance(confirm, bool) or confirm < 0:
            raise ValueError(f"confirm must be an int >= 0, got {confirm!r}")
        if parallel is not None and (not isinstance(parallel, int) or parallel < 1):
            raise ValueError(f"parallel must be an int >= 1, got {parallel!r}")
        if executor is not None and not (isinstance(executor, Executor) or callable(executor)):
            raise ValueError(
                "executor must be a concurrent.futures.Executor or a function that makes one, "
                f"got {executor!r}"
            )
        if executor is None and (parallel or 1) > 1:
            raise ValueError(
                f"parallel={parallel} needs an executor, such as ProcessPool({parallel})"
            )
        if per_sample is not None and not callable(per_sample):
            raise ValueError(
                f"per_sample must be a callable (outputs, batch) -> Tensor[n], got {per_sample!r}"
            )
        if metric_std is not None and not (_is_number(metric_std) and metric_std >= 0):
            raise ValueError(f"metric_std must be a number >= 0, got {metric_std!r}")
        if not _is_number(warm_start) or not 0 <= warm_start <= 1:
            raise ValueError(f"warm_start must be a share in [0, 1], got {warm_start!r}")
        self.space = SearchSpace(scheme)
        self.objective = as_objective(objective, direction)
        self.metric = metric
        self.mode = mode
        self.goal = Goal(mode, self.objective.direction, tolerance, budget)
        if isinstance(self.objective, Several) and (budget is not None or method == "paper"):
            raise ValueError(
                f"several objectives ({self.objective.name}) need a tolerance and any method but "
                f"'paper', got budget={budget!r} and method={method!r}; SearchResult.pick chooses "
                "from the front within budgets"
            )
        self.max_trials = max_trials
        self.trainer = dict(trainer or {})
        self.callback = dict(callback or {})
        self.strategy = strategy_for(method, self.goal)
        self.share = share_of_training(fidelity, self.trainer)
        if fidelity < 1 and method not in ("auto", "condensa"):
            raise ValueError(f"fidelity={fidelity} needs method='auto', got method={method!r}")
        self.executor, self.parallel = executor, parallel
        self.metric_std, self.per_sample = metric_std, per_sample
        self.confirm = confirm
        self.scan = scan
        self.warm_start, self.early_abort = float(warm_start), early_abort
        self.seed = seed
        self.dirpath = Path(dirpath)
        self.storage = storage or f"sqlite:///{self.dirpath / 'study.db'}"
        self.study_name = study_name
        self.progress = progress
        self.confidence, self.z = confidence, margin_of(confidence)
        if confidence is not None and budget is not None:
            raise ValueError(
                f"confidence={confidence} is that of keeping a level of the metric, and none is to "
                f"be kept within budget={budget}; confirm= trains the best again"
            )

    def fit(
        self,
        model: pl.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
    ) -> SearchResult:
        """Run the trials that are still to be run.

        Args:
            model: A trained module: the baseline, and every trial's starting point. It is left
                as it is.
            train_dataloaders: As for ``Trainer.fit``.
            val_dataloaders: As for ``Trainer.fit``; needed, for the metric.
            datamodule: As for ``Trainer.fit``, instead of loaders.

        Returns:
            All trials and the best feasible one.

        Raises:
            ValueError: If the module, data or metric do not fit, before any training.
        """
        data = self._check(model, train_dataloaders, val_dataloaders, datamodule)
        self.dirpath.mkdir(parents=True, exist_ok=True)
        runs = self.max_trials + self.confirm
        with self._alone(), SearchProgress(runs, self.progress) as progress:
            store = Store(self.storage, self.study_name, self.goal.optimized)
            store.claim(self._config(model))
            progress.status("measuring the dense model", 0)
            dense = DenseModel(self, store, model, data)
            baseline = dense.baseline()
            progress.status("evaluating the objective on projected models", 0)
            formulation = Formulation(
                self.space, self.objective, model, baseline, self.goal, self.z, self.share
            )
            if self.scan and formulation.scannable:
                progress.status("measuring one dimension at a time", 0)
                formulation.use(dense.sensitivity())
            noise = NoiseModel(baseline.noise, dense.scores(), progress.print)
            return SearchRun(self, store, model, data, formulation, noise, progress).run()

    def _check(
        self, model: object, train: Any, val: Any, datamodule: pl.LightningDataModule | None
    ) -> Data:
        if not isinstance(model, pl.LightningModule):
            raise ValueError(f"model must be a LightningModule, got {type(model).__name__}")
        if datamodule is None and (train is None or val is None):
            raise ValueError(
                "fit needs a datamodule, or train_dataloaders and val_dataloaders; "
                f"got train_dataloaders={train!r}, val_dataloaders={val!r}"
            )
        graph = self.space.scheme.trace(model)
        for values in self.space.extremes():
            self.space.scheme.at(values).bind(model, graph)
        return Data(datamodule, train, val)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the directory: a second driver would take this one's trials for interrupted."""
        lock = FileLock(self.dirpath / ".lock")
        try:
            lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout:
            raise RuntimeError(
                f"another search is running in dirpath={str(self.dirpath)!r}; wait, or use another"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _config(self, model: nn.Module) -> dict[str, Any]:
        """What makes two searches the same; how much is tolerated, or run, may change."""
        kind = {} if self.goal.budget is None else {"goal": "budget"}
        return {
            **kind,
            "scheme": self.space.scheme.to_yaml(),
            "objective": self.objective.name,
            "metric": self.metric,
            "mode": self.mode,
            "starting weights": weights_hash(model),
        }

    def recorder(self, directory: Path) -> ScoreRecorder | None:
        """What collects the scores of samples; nothing where the noise is given."""
        if self.metric_std is not None:
            return None
        return ScoreRecorder(directory / SCORES_FILE, self.metric, self.per_sample)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
