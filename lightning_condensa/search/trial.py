"""One evaluation: a Trainer run of the user's module under one scheme, in any process."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.mpi import MPIEnvironment
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.utilities.memory import garbage_collection_cuda, is_oom_error
from pytorch_lightning.utilities.seed import isolate_rng

from lightning_condensa.callbacks import CondensaCallback
from lightning_condensa.deploy import CompressedModel
from lightning_condensa.deploy.atomic import write_atomically
from lightning_condensa.objectives import Objective
from lightning_condensa.schemes import NotFiniteError, Scheme
from lightning_condensa.search.abort import AbortRule, CurveWatch
from lightning_condensa.search.metrics import evaluate
from lightning_condensa.search.recorder import ScoreRecorder
from lightning_condensa.search.warm_start import WarmStart, keep_teachers, shortened

Mode = Literal["min", "max"]
MODEL_FILE = "model.condensa"
RECORD_FILE = "trial.json"


@dataclass(frozen=True)
class Data:
    """What ``Trainer.fit`` and ``Trainer.validate`` are given.

    Attributes:
        datamodule: A LightningDataModule, or ``None``.
        train: Training loaders where there is no data module.
        val: Validation loaders where there is no data module.
    """

    datamodule: pl.LightningDataModule | None = None
    train: Any = None
    val: Any = None

    def fit_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``Trainer.fit``."""
        if self.datamodule is not None:
            return {"datamodule": self.datamodule}
        return {"train_dataloaders": self.train, "val_dataloaders": self.val}

    def validate_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``Trainer.validate``."""
        if self.datamodule is not None:
            return {"datamodule": self.datamodule}
        return {"dataloaders": self.val}


@dataclass(frozen=True)
class TrialJob:
    """All that a worker needs; plain data besides the user's own objects.

    Attributes:
        number: Number of the trial in the study.
        module: The starting point; it is copied, never changed.
        data: The data.
        scheme: The scheme, without open dimensions.
        trainer: Keyword arguments of the Trainer.
        callback: Keyword arguments of :class:`~lightning_condensa.CondensaCallback`.
        metric: The metric to keep.
        mode: Its direction.
        objective: What is optimized.
        directory: Where the trial's logs and files go.
        seed: Seed of every random generator in the trial.
        stamp: When the study began the trial; tells its record from one of another study.
        watchers: Further callbacks, not copied; only for trials in this process.
        recorder: Collects scores of samples in the last validation; ``None`` for none.
        start: What it goes on from instead of the module, ``None`` for the module itself.
        rule: When to end it early.
        fidelity: Share of the training; of the shortened one where it starts from a model.
    """

    number: int
    module: pl.LightningModule
    data: Data
    scheme: Scheme
    trainer: Mapping[str, Any]
    callback: Mapping[str, Any]
    metric: str
    mode: Mode
    objective: Objective
    directory: Path
    seed: int
    stamp: str = ""
    watchers: tuple[pl.Callback, ...] = ()
    recorder: ScoreRecorder | None = None
    start: WarmStart | None = None
    rule: AbortRule | None = None
    fidelity: float = 1.0


@dataclass(frozen=True)
class TrialOutcome:
    """What a trial found, as plain data.

    Attributes:
        status: ``"complete"``, ``"diverged"`` (no usable metric: an infeasible observation),
            ``"aborted"`` (ended early: the metric is that of the best model until then) or
            ``"failed"`` (an error: no observation).
        metric: The metric of the compressed model on the validation data.
        objective: The objective of the compressed model.
        details: The objective's details.
        metrics: Everything that validation logged.
        steps: Optimizer steps.
        seconds: Wall-clock time.
        message: The error, where there was one.
        parent: The trial whose model it started from; ``None`` for the uncompressed one.
        curve: ``(progress, metric)`` of the validations in training.
        bound: What the metric of an aborted trial would have stayed short of.
    """

    status: Literal["complete", "diverged", "aborted", "failed"]
    metric: float | None = None
    objective: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    message: str = ""
    parent: int | None = None
    curve: list[list[float]] = field(default_factory=list)
    bound: float | None = None

    @property
    def objectives(self) -> dict[str, float]:
        """All objectives by name, where there are several."""
        return {
            name: float(own["value"]) for name, own in self.details.get("objectives", {}).items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The outcome as plain data."""
        return asdict(self)


def run_trial(job: TrialJob) -> TrialOutcome:
    """Train, validate, measure and save one compressed model.

    Errors in the user's code are recorded, not raised, so that one bad point does not end a
    search; what stops the process (``KeyboardInterrupt``, ``SystemExit``) does, and lack of
    memory, which says more about the machine than about the point.

    Args:
        job: The trial.

    Returns:
        The outcome, which also stands in the trial's directory as JSON.

    Raises:
        RuntimeError: If memory runs out, of a device (``torch.OutOfMemoryError``) or the host.
        MemoryError: The same from Python.
    """
    started = time.perf_counter()
    job.directory.mkdir(parents=True, exist_ok=True)
    try:
        with isolate_rng():
            outcome = _train(job)
    except NotFiniteError as error:
        outcome = {"status": "diverged", "message": str(error)}
    except Exception as error:  # recorded: the search goes on, and shows the message
        if out_of_memory(error):
            garbage_collection_cuda()
            raise
        trace = "".join(traceback.format_exception(error))
        write_atomically(job.directory / "error.txt", trace.encode())
        outcome = {"status": "failed", "message": f"{type(error).__name__}: {error}"}
    parent = None if job.start is None else job.start.parent
    result = TrialOutcome(**outcome, seconds=time.perf_counter() - started, parent=parent)
    record = {
        "number": job.number,
        "stamp": job.stamp,
        "scheme": job.scheme.to_config(),
        **result.to_dict(),
    }
    write_atomically(job.directory / RECORD_FILE, json.dumps(record, indent=1).encode())
    return result


def read_outcome(directory: Path, stamp: str) -> TrialOutcome | None:
    """What a trial left in its directory; ``None`` where it did not end.

    Args:
        directory: Of the trial.
        stamp: Of its job.
    """
    path = directory / RECORD_FILE
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    if record.get("stamp") != stamp:
        return None
    known = {f.name for f in fields(TrialOutcome)} & record.keys()  # of another release, say
    return TrialOutcome(**{name: record[name] for name in known})


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no memory left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_oom_error(error)


def _train(job: TrialJob) -> dict[str, Any]:
    pl.seed_everything(job.seed, verbose=False)
    module = deepcopy(job.module)
    callback = CondensaCallback(
        job.scheme, **{"monitor": job.metric, "mode": job.mode, **job.callback}
    )
    arguments, share = job.trainer, job.fidelity
    if job.start is not None:
        job.start.load(module)
        share *= job.start.share
    if job.start is not None or share < 1:
        arguments = shortened(arguments, share)
    trainer = make_trainer(arguments, job.directory, (callback,))
    if job.start is not None:
        keep_teachers(trainer.callbacks, job.module)  # type: ignore[attr-defined]
    spawns = trainer.strategy.launcher is not None
    watch = CurveWatch(job.metric, job.rule)
    if not spawns:  # what they note, and bars, live in this process
        trainer.callbacks.extend([watch, *job.watchers])  # type: ignore[attr-defined]
    trainer.fit(module, **job.data.fit_arguments())
    if trainer.interrupted:
        raise KeyboardInterrupt
    steps = trainer.global_step
    arguments = job.data.validate_arguments()
    metrics = evaluate(trainer, module, arguments, job.metric, job.recorder)
    # A launcher that spawns brings the weights back, but not what the callback holds; projecting
    # the compressed weights again gives the same θ.
    compressed = CompressedModel.compress(module, job.scheme) if spawns else callback.compressed
    details = job.objective.details(compressed)
    compressed.save(job.directory / MODEL_FILE)
    metric = metrics[job.metric]
    finite = math.isfinite(metric)
    ended = "complete" if watch.bound is None else "aborted"
    return {
        "status": ended if finite else "diverged",
        "message": watch.message if finite else f"{job.metric} is {metric}",
        "curve": watch.curve,
        "bound": watch.bound if finite else None,
        "metric": metric if finite else None,
        "objective": float(details["value"]),
        "details": details,
        "metrics": {k: v for k, v in metrics.items() if math.isfinite(v)},
        "steps": steps,
    }


def make_trainer(
    arguments: Mapping[str, Any], directory: Path, callbacks: tuple[pl.Callback, ...] = ()
) -> pl.Trainer:
    """A Trainer for one run: the user's arguments over quiet defaults, logs in ``directory``."""
    own = dict(arguments)
    users = own.pop("callbacks", None) or []
    users = [users] if isinstance(users, pl.Callback) else users
    defaults: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "default_root_dir": directory,
        "logger": TensorBoardLogger(directory, name="", version=""),
    }
    plugins = _with_environment(own.pop("plugins", None), own.get("strategy"))
    trainer = pl.Trainer(
        **{**defaults, **own}, plugins=plugins, callbacks=[*deepcopy(list(users)), *callbacks]
    )
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        raise ValueError(
            f"trainer: {type(trainer.strategy).__name__} on {trainer.world_size} devices would "
            "start the whole script again for every trial; use strategy='ddp_spawn' or one device"
        )
    return trainer


def _with_environment(plugins: Any, strategy: Any) -> list[Any]:
    """The user's plugins, and one that keeps Lightning from taking an MPI job for one training.

    A Trainer on several devices would wait for the job's other processes, which have trials of
    their own.
    """
    given = [plugins] if plugins is not None and not isinstance(plugins, list) else plugins or []
    chosen = getattr(strategy, "cluster_environment", None) is not None
    if chosen or any(isinstance(p, ClusterEnvironment) for p in given):
        return given
    return [*given, LightningEnvironment()] if MPIEnvironment.detect() else given
