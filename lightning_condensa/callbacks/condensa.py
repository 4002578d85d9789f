"""L-C as a Lightning callback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_condensa.callbacks.checks import (
    as_scheme,
    check_optimizers,
    check_trainer,
    scheme_text,
)
from lightning_condensa.callbacks.logs import log_c_step, log_summary, show_progress
from lightning_condensa.callbacks.snapshot import Snapshot
from lightning_condensa.callbacks.swap import WeightSwap
from lightning_condensa.deploy import CompressedModel, Report
from lightning_condensa.lc import LCRun, Schedule, make_schedule
from lightning_condensa.schemes import BoundScheme, Scheme
from lightning_condensa.schemes.base import PRUNE

_CHECKPOINT_KEY = "condensa_training_weights"


class CondensaCallback(Callback):
    """Compress the module while it trains, with the L-C algorithm; after ``fit`` it holds θ.

    The user's own optimizer, precision, accumulation and clipping stay as they are: the penalty
    enters as a gradient, after unscaling and all-reduce and before clipping. Validation and test
    during ``fit``, checkpoints, early stopping and loggers see the compressed model, under the
    scheme's final density from the first epoch on. Checkpoints hold θ in ``state_dict``, so that
    they load into the plain module, and the training weights beside it, so that ``fit`` resumes
    bit for bit.

    Memory: two buffers per compressed parameter (θ and ``μΔ(θ) + λ``), a third one during a
    C-step and during validation, and with ``monitor`` a copy of the best model on the CPU.

    Args:
        scheme: What to compress, and how; a mapping as :meth:`Scheme.to_config` writes it, too.
        preset: ``"default"`` (:class:`~lightning_condensa.lc.LCSchedule`) or ``"paper"``
            (:class:`~lightning_condensa.lc.PaperSchedule`), the published algorithm.
        schedule: Fields of the preset's schedule to change, or a schedule of your own.
        monitor: A metric that the module logs in validation; the best θ by it is kept. Without
            one, the last θ.
        mode: Whether more (``"max"``) or less (``"min"``) of ``monitor`` is better.

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
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        self.scheme = as_scheme(scheme)
        self.schedule = make_schedule(preset, schedule)
        self.monitor = monitor
        self.mode = mode
        self._bound: BoundScheme | None = None
        self._swap = WeightSwap({})
        self._run: LCRun | None = None
        self._best: Snapshot | None = None
        self._start = 0  # trainer.global_step when this run began
        self._seen_global_step = 0
        self._restored: dict[str, Any] | None = None
        self._compressed: CompressedModel | None = None
        self._gaps: dict[str, float] = {}

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
        """Per-layer density, bits, bytes, gap, and why the other parameters were left alone."""
        return self.compressed.report(gaps=self._gaps)

    # -- fit -------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the state of a checkpoint that was loaded before, by ``trainer.test`` say."""
        self._restored = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolve the scheme against the module, before any training."""
        self._bound = self.scheme.bind(pl_module)
        named = dict(pl_module.named_parameters())
        self._swap = WeightSwap({name: named[name] for name in self._bound.names})
        self._compressed = self._run = None
        check_trainer(trainer, self.monitor)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plan the run and make the first C-step, or take up a run that was interrupted."""
        assert self._bound is not None
        check_optimizers(trainer, pl_module)
        restored, self._restored = self._restored, None
        self._seen_global_step = trainer.global_step
        self._start = trainer.global_step if restored is None else restored["start"]
        prunes = any(stage.order == PRUNE for stage, _ in self._bound.stages)
        plan = self.schedule.plan(self._planned_steps(trainer), prunes, _steps_per_epoch(trainer))
        self._run = LCRun(self._bound, plan, self._swap.parameters)
        if restored is None:
            self._best = None
            log_c_step(trainer, self._run.start())
        else:
            self._run.load_state_dict(restored["run"])
            best = restored["best"]
            self._best = None if best is None else Snapshot.from_state(best)

    def _planned_steps(self, trainer: pl.Trainer) -> int:
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total) or total - self._start < 1:
            raise ValueError(
                "CondensaCallback must know how many optimizer steps are to come: set max_epochs "
                f"or max_steps on the Trainer (it expects {total}, {self._start} are done)"
            )
        return int(total) - self._start

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the learning rate where the schedule has one."""
        assert self._run is not None
        if self._run.plan.learning_rate is not None:
            lr = self._run.plan.learning_rate(self._run.step)
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr

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
        assert self._run is not None
        if trainer.global_step == self._seen_global_step:  # accumulating
            return
        self._seen_global_step = trainer.global_step
        c_step = self._run.after_step(trainer.optimizers)
        if c_step is not None:
            log_c_step(trainer, c_step)
            show_progress(pl_module, c_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave θ in the module: the best by ``monitor``, else the last."""
        run = self._run
        assert run is not None
        if run.step < run.plan.c_steps[-1]:
            rank_zero_warn(
                f"training stopped after {run.step} optimizer steps, in the L-C phase, "
                f"which was to last {run.plan.c_steps[-1]}: θ is the projection as it stands"
            )
        theta = run.finish()
        self._gaps = run.gaps if run.finetuning else run.relative_gaps(theta)
        metrics = {}
        if self.monitor is not None and self._best is None:
            rank_zero_warn(f"monitor={self.monitor!r} was never measured: the last θ is kept")
        if self._best is not None:
            device = pl_module.device
            theta = {name: encoded.to(device) for name, encoded in self._best.theta.items()}
            pl_module.load_state_dict(self._best.rest, strict=False)
            metrics = {str(self.monitor): self._best.score}
        self._swap.copy({name: encoded.decode() for name, encoded in theta.items()})
        self._compressed = CompressedModel(pl_module, theta, self.scheme)
        self._run = None
        log_summary(trainer, self._compressed, self.scheme, metrics)

    # -- validation sees θ -----------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put θ into the module."""
        if self._run is not None and trainer.state.fn == TrainerFn.FITTING:
            theta = self._run.project(self._swap.training_weights)
            self._swap.swap_in({name: encoded.decode() for name, encoded in theta.items()})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep θ if it is the best so far, and put the training weights back."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.sanity_checking:
            if self.monitor is not None:  # find a misspelt name before any training
                self._monitored(trainer, self.monitor)
            return
        if self._run is None:
            return
        if self.monitor is not None:
            score = self._monitored(trainer, self.monitor)
            beaten = self._best is not None and self._best.beats(score, self.mode)
            if math.isfinite(score) and not beaten:
                theta = self._run.project(self._swap.training_weights)
                self._best = Snapshot.take(score, self._run.step, theta, pl_module)
        self._swap.swap_out()

    @staticmethod
    def _monitored(trainer: pl.Trainer, monitor: str) -> float:
        if monitor not in trainer.callback_metrics:
            raise ValueError(
                f"monitor={monitor!r} is not logged by the module; "
                f"it logs {sorted(trainer.callback_metrics)}"
            )
        # The mean over all ranks, so that they agree on the best θ.
        return float(trainer.strategy.reduce(trainer.callback_metrics[monitor], reduce_op="mean"))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Put the training weights back if validation was interrupted."""
        self._swap.swap_out()

    # -- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """θ in ``state_dict``, the training weights under a key of their own."""
        if self._run is None:
            return
        weights = self._swap.training_weights
        checkpoint[_CHECKPOINT_KEY] = {n: w.detach().clone() for n, w in weights.items()}
        theta = self._run.project(weights)
        decoded = {name: encoded.decode() for name, encoded in theta.items()}
        self._swap.overwrite(checkpoint["state_dict"], pl_module, decoded)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the training weights; every other use of the checkpoint gets θ."""
        if trainer.state.fn == TrainerFn.FITTING and _CHECKPOINT_KEY in checkpoint:
            pl_module.load_state_dict(checkpoint[_CHECKPOINT_KEY], strict=False)

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-identical continuation needs, except the training weights."""
        if self._run is None:
            return {}
        return {
            "scheme": scheme_text(self.scheme),
            "start": self._start,
            "run": self._run.state_dict(),
            "best": None if self._best is None else self._best.state_dict(),
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


def _steps_per_epoch(trainer: pl.Trainer) -> int | None:
    """Optimizer steps in an epoch; ``None`` where an iterable data set does not tell."""
    batches = trainer.num_training_batches
    if not math.isfinite(batches):
        return None
    return max(math.ceil(batches / trainer.accumulate_grad_batches), 1)
