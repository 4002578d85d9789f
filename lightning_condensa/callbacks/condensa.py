"""L-C as a Lightning callback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_condensa.callbacks.averaging import is_averaged, move_behind_averaging
from lightning_condensa.callbacks.checks import (
    as_scheme,
    check_inference_mode,
    check_optimizers,
    check_plan,
    check_strategy,
    check_trainer,
    check_unchanged,
    scheme_text,
)
from lightning_condensa.callbacks.deployment import Deployment, load_training_weights
from lightning_condensa.callbacks.horizon import planned_steps, steps_per_epoch, trains
from lightning_condensa.callbacks.logs import log_c_step, log_summary, show_progress
from lightning_condensa.callbacks.rates import SparseRates
from lightning_condensa.callbacks.sharded import gathered
from lightning_condensa.callbacks.snapshot import Snapshot, measured
from lightning_condensa.deploy import CompressedModel, Report
from lightning_condensa.functional.placement import reshard
from lightning_condensa.lc import LCRun, Schedule, make_schedule
from lightning_condensa.lc.arguments import check_int
from lightning_condensa.schemes import BoundScheme, Scheme


class CondensaCallback(Callback):
    """Compress the module while it trains, with the L-C algorithm; after ``fit`` it holds θ.

    The user's own optimizer, precision, accumulation and clipping stay as they are: pruned weights
    get no gradient, what a scheme rounds is trained through its rounding, and optimizer steps are
    made at a learning rate that rises as the network gets sparse, which schedulers and monitors do
    not see (the paper's penalty enters as a gradient, after unscaling and all-reduce and before
    clipping). A module that is sparse already is a warm start: the ramp begins at its density.

    Validation and test during ``fit``, checkpoints, early stopping and loggers see the compressed
    model, under the scheme's final density from the first epoch on. Checkpoints hold θ in
    ``state_dict``, so that they load into the plain module, and the training weights beside it, so
    that ``fit`` resumes bit for bit.

    With ``ModelParallelStrategy`` (FSDP2, tensor parallelism) all of it stays sharded like the
    parameters; for a checkpoint training weights and buffers are gathered in the CPU memory of the
    first process. It needs ``Trainer(inference_mode=False)``, and whatever ``compressed`` counts or
    saves is a collective call, which every process has to make. ``FSDPStrategy`` and
    ``DeepSpeedStrategy`` are refused.

    Memory, in numbers per weight: one where it is pruned, one where its value is projected, and in
    the last steps before a C-step one more where it is pruned; two with the paper's preset, θ and
    ``μΔ(θ) + λ``. During a C-step and validation there is another copy, and with ``monitor`` one of
    the best model on the CPU.

    Args:
        scheme: What to compress, and how; a mapping as :meth:`Scheme.to_config` writes it, too.
        preset: ``"default"`` (:class:`~lightning_condensa.lc.LCSchedule`) or ``"paper"``
            (:class:`~lightning_condensa.lc.PaperSchedule`), the published algorithm.
        schedule: Fields of the preset's schedule to change, or a schedule of your own.
        monitor: A metric that the module logs in validation; the best θ by it is kept. Without
            one, the last θ.
        mode: Whether more (``"max"``) or less (``"min"``) of ``monitor`` is better.
        bn_batches: Training batches, the last ones of an epoch, to estimate the running statistics
            of batch norm layers from where θ is far from the training weights: these have
            statistics of their own. 0 switches it off.

    Raises:
        ValueError: If an argument is out of range; at the start of ``fit``, if the scheme does
            not fit the module or the schedule does not fit the Trainer.

    Example:
        >>> from lightning_condensa import CondensaCallback, Prune
        >>> callback = CondensaCallback(Prune(density=0.05), schedule={"l_steps": 30})
    """

    def __init__(
        self,
        scheme: Scheme | Mapping[str, Any],
        preset: Literal["default", "paper"] = "default",
        *,
        schedule: Schedule | Mapping[str, Any] | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        bn_batches: int = 4,
    ) -> None:
        check_int("bn_batches", bn_batches, 0)
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        self.scheme = as_scheme(scheme)
        self.schedule = make_schedule(preset, schedule)
        self.monitor = monitor
        self.mode = mode
        self.bn_batches = bn_batches
        self._bound: BoundScheme | None = None
        self._parameters: dict[str, Tensor] = {}
        self._sharded = False
        self._deployment: Deployment | None = None
        self._run: LCRun | None = None
        self._rates: SparseRates | None = None
        self._best: Snapshot | None = None
        self._start = {"epoch": 0, "step": 0}  # the Trainer's counters when this run began
        self._seen_global_step = 0
        self._restored: dict[str, Any] | None = None
        self._compressed: CompressedModel | None = None
        self._report: Report | None = None

    # -- results ---------------------------------------------------------------------------------

    @property
    def compressed(self) -> CompressedModel:
        """The compressed model.

        Raises:
            RuntimeError: Before the end of ``fit``.
        """
        if self._compressed is None:
            raise RuntimeError("there is no compressed model yet: run trainer.fit first")
        return self._compressed

    def report(self) -> Report:
        """Per-layer density, bits, bytes, gap, and why the other parameters were left alone.

        Raises:
            RuntimeError: Before the end of ``fit``.
        """
        if self._report is None:
            raise RuntimeError("there is no report yet: run trainer.fit first")
        return self._report

    # -- fit -------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the state of a checkpoint that was loaded before, by ``trainer.test`` say."""
        self._restored = None
        move_behind_averaging(trainer, self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolve the scheme against the module, before any training."""
        check_strategy(trainer)
        reshard(pl_module)
        self._bound = self.scheme.bind(pl_module)
        named = dict(pl_module.named_parameters())
        self._parameters = {name: named[name] for name in self._bound.names}
        self._sharded = any(isinstance(p, DTensor) for p in self._parameters.values())
        self._run = None
        check_trainer(trainer, self.monitor)
        self._deployment = Deployment(trainer, pl_module, self._parameters, self.bn_batches)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plan the run and make the first C-step, or take up a run that was interrupted."""
        assert self._bound is not None and self._deployment is not None
        reshard(pl_module)
        check_optimizers(trainer, pl_module)
        restored, self._restored = self._restored, None
        self._compressed = self._report = None
        self._seen_global_step = trainer.global_step
        now = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        self._start = now if restored is None else restored["start"]
        steps = planned_steps(trainer, pl_module, self._start["epoch"], self._start["step"])
        plan = self.schedule.plan(
            steps,
            prunes=self._bound.prunes,
            projects=self._bound.projects,
            rounds=self._bound.rounds,
            steps_per_epoch=steps_per_epoch(trainer),
        )
        check_plan(plan, self.scheme, averaged=is_averaged(trainer))
        self._run = LCRun(self._bound, plan, self._parameters)
        if restored is None:
            self._best = None
            log_c_step(trainer, self._run.start(), self._run.plan)
        else:
            self._run.load_state_dict(restored["run"])
            if pl_module.automatic_optimization and restored["seen"] != trainer.global_step:
                # Saved by a callback whose turn after the optimizer's step came before ours.
                self._run.after_step(trainer.optimizers)
            best, module = restored["best"], self._deployment.module
            self._best = None if best is None else Snapshot.from_state(best, module)
        run, pruned = self._run, [self._parameters[n] for n in self._bound.pruned]
        self._rates = SparseRates(lambda: run.lr_factor, pruned)
        self._rates.attach(trainer.optimizers)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the learning rate where the schedule has one, and keep the inputs of the batch."""
        assert self._run is not None and self._bound is not None and self._deployment is not None
        settled = self._run.finetuning and not self._bound.projects and not is_averaged(trainer)
        self._deployment.statistics.open(batch_idx, needed=not settled)
        if self._run.plan.learning_rate is not None:
            lr = self._run.plan.learning_rate(self._run.step)
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Look away: activation checkpointing calls parts of the module again."""
        assert self._deployment is not None
        self._deployment.statistics.close()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the penalty's gradient, or mask the gradients in the fine-tune phase."""
        assert self._run is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            # A fused optimizer would unscale inside its step, after the penalty.
            scaler.unscale_(optimizer)
        self._run.before_step(optimizer, only_its_own=len(trainer.optimizers) > 1)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count optimizer steps; make the C-steps that are due."""
        assert self._run is not None and self._deployment is not None
        self._deployment.statistics.close()
        accumulating = trainer.global_step == self._seen_global_step
        if (accumulating and pl_module.automatic_optimization) or not trains(trainer, pl_module):
            return
        self._seen_global_step = trainer.global_step
        if self._sharded:
            reshard(pl_module)
        c_step = self._run.after_step(trainer.optimizers)
        if c_step is not None:
            check_unchanged(pl_module, self._run.bound, self._parameters)
            log_c_step(trainer, c_step, self._run.plan)
            show_progress(pl_module, c_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave θ in the module: the best by ``monitor``, else the last."""
        run, deployment, rates = self._run, self._deployment, self._rates
        assert run is not None and deployment is not None and rates is not None
        rates.detach()
        if run.step < run.plan.l_end:
            rank_zero_warn(
                f"training stopped after {run.step} optimizer steps, in the L-C phase, "
                f"which was to last {run.plan.l_end}: θ is the projection as it stands"
            )
        reshard(pl_module)
        check_unchanged(pl_module, run.bound, self._parameters)
        theta = run.finish(averaged=is_averaged(trainer))
        gaps = run.gaps or run.relative_gaps(theta)
        metrics = {}
        if self.monitor is not None and self._best is None:
            rank_zero_warn(f"monitor={self.monitor!r} was never measured: the last θ is kept")
        stale = self._best is None and deployment.statistics.stale(run, theta)
        if self._best is not None:
            device = pl_module.device
            theta = {name: encoded.to(device) for name, encoded in self._best.theta.items()}
            pl_module.load_state_dict(self._best.rest, strict=False)
            metrics = {str(self.monitor): self._best.score}
        deployment.finish(trainer, pl_module, theta, stale)
        self._compressed = CompressedModel(pl_module, theta, self.scheme)
        self._report = self._compressed.report(gaps)
        for text in self._report.warnings:
            rank_zero_warn(text)
        self._run = self._rates = None
        log_summary(trainer, self._compressed, self.scheme, metrics)

    # -- validation sees θ -----------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put θ into the module."""
        check_inference_mode(self._parameters)
        if self._run is not None and trainer.state.fn == TrainerFn.FITTING:
            assert self._deployment is not None
            reshard(pl_module)
            check_unchanged(pl_module, self._run.bound, self._parameters)
            self._deployment.begin(trainer, self._run)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep θ if it is the best so far, and put the training weights back."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        # In the sanity check, too: a misspelt name is found before any training.
        score = None if self.monitor is None else measured(trainer, self.monitor)
        if self._run is None:
            return
        assert self._deployment is not None
        beaten = score is not None and self._best is not None and self._best.beats(score, self.mode)
        if score is not None and math.isfinite(score) and not beaten:
            theta, module = self._deployment.theta(self._run), self._deployment.module
            self._best = Snapshot.take(score, self._run.step, theta, module)
        self._deployment.end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Put the training weights and the learning rates back, whatever was interrupted."""
        if self._rates is not None:
            self._rates.detach()
        if self._deployment is not None:
            self._deployment.statistics.clear()
            self._deployment.end()

    # -- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """θ in ``state_dict``, the training weights under a key of their own."""
        if self._run is not None and self._deployment is not None:
            self._deployment.save(trainer, self._run, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the training weights; every other use of the checkpoint gets θ."""
        if trainer.state.fn == TrainerFn.FITTING:
            load_training_weights(trainer, pl_module, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-identical continuation needs, except the training weights."""
        if self._run is None:
            return {}
        return {
            "scheme": scheme_text(self.scheme),
            "start": self._start,
            "seen": self._seen_global_step,
            "run": gathered(self._run.state_dict()),
            "best": None if self._best is None else gathered(self._best.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state up when training starts.

        Raises:
            ValueError: If the checkpoint is of a run with another scheme.
        """
        if not state_dict:
            return
        other, own = state_dict["scheme"], scheme_text(self.scheme)
        if other != own and None not in (other, own):
            raise ValueError(
                f"the checkpoint belongs to another scheme: {other}, this callback has {own}"
            )
        self._restored = state_dict
