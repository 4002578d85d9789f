"""Knowledge distillation, as a Lightning callback."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from lightning_condensa.callbacks.tap import Stopwatch, Tap
from lightning_condensa.callbacks.teacher import Guest, frozen_copy, load_tensors, tensors_of
from lightning_condensa.functional.distillation import distillation_loss


class Distillation(Callback):
    """Let a teacher's logits guide training: ``(1 − weight)·loss + weight·T²·KL(teacher‖student)``.

    Hinton, Vinyals and Dean 2015 (arXiv:1503.02531). Without a ``teacher`` the module learns from
    itself as it was when ``fit`` started, which is what a network under compression wants: put
    this callback beside :class:`~lightning_condensa.CondensaCallback`.

    The contract: ``training_step`` calls ``self(x)``, which returns logits, or calls a submodule
    that does, named by ``layer``; that is the student. The teacher gets the very arguments of each
    such call, so it sees the augmented batch. Calls without gradients are left alone; of several
    calls in a step the mean counts. The loss that the module logs stays its own. The terms share
    one backward pass, with the same scaling for mixed precision and gradient accumulation.

    A copied teacher is part of every checkpoint, so that a resumed run learns from the start of
    the first run; a given one must be given again. The copy of a compiled module runs eagerly.

    Memory: the teacher's weights and, between its forward pass and the student's, its logits.

    Args:
        teacher: Called with the arguments that the student is called with, in evaluation mode and
            without gradients; its modes and device are restored after ``fit``. ``None``: a copy
            of the student at the start of ``fit``.
        weight: Share of the distillation term, in [0, 1].
        temperature: T, more than 0.
        layer: Name of the submodule that maps inputs to logits, such as ``"network"``; ``None``
            is the module itself. Its last layer alone would be a poor choice: the teacher's last
            layer would then read the student's features.
        logits: Key or index of the logits where student or teacher return more than a tensor.
        class_dim: Dimension of the classes: the last one by default, 1 for dense prediction,
            ``(batch, classes, height, width)``. The mean is taken over all others.

    Attributes:
        teacher_seconds: Time that the teacher took in the last ``fit``; ``None`` before.
        teacher_share: The same as a share of the time of all training batches.

    Raises:
        ValueError: If an argument is out of range; at the start of ``fit``, if there is no such
            ``layer``, with manual optimization (add
            :func:`~lightning_condensa.functional.distillation.distillation_loss` to your loss
            instead), or without a teacher where the strategy shards the module; in training, if
            a step calls no student, or logits differ in shape.

    Example:
        >>> from lightning_condensa import CondensaCallback, Distillation, Prune
        >>> callback = Distillation(weight=0.7, temperature=2.0)
        >>> trainer = pl.Trainer(callbacks=[CondensaCallback(Prune(0.05)), callback], logger=False)
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        weight: float = 0.5,
        temperature: float = 4.0,
        *,
        layer: str | None = None,
        logits: str | int | None = None,
        class_dim: int = -1,
    ) -> None:
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise ValueError(f"teacher must be a torch.nn.Module or None, got {teacher!r}")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be in [0, 1], got {weight}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be finite and more than 0, got {temperature}")
        self.teacher = teacher
        self.weight = weight
        self.temperature = temperature
        self.layer = layer
        self.logits = logits
        self.class_dim = class_dim
        self.teacher_seconds: float | None = None
        self.teacher_share: float | None = None
        self._copy: nn.Module | None = None
        self._restored: dict[str, Any] = {}
        self._guest: Guest | None = None
        self._tap: Tap | None = None
        self._batches = self._calls = Stopwatch(torch.device("cpu"))

    # -- fit -------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the state of a checkpoint that was loaded before, by ``trainer.test`` say."""
        self._restored = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the student, on its device and before any training, unless a teacher is given."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "Distillation needs automatic optimization: with manual optimization add "
                "lightning_condensa.functional.distillation.distillation_loss to your loss"
            )
        student = self._student(pl_module)
        restored, self._restored = self._restored, {}
        own = list(pl_module.parameters())
        if self.teacher is None:
            teacher = self._copy = self._copied(trainer, student, restored)
            self._guest = Guest(teacher, pl_module.device, home=torch.device("cpu"))
        else:
            teacher = self.teacher
            if {id(p) for p in teacher.parameters()} & {id(p) for p in own}:
                raise ValueError("teacher must not share parameters with the module it teaches")
            self._guest = Guest(teacher, pl_module.device)
        self._batches, self._calls = Stopwatch(pl_module.device), Stopwatch(pl_module.device)
        self._tap = Tap(
            student,
            teacher,
            key=self.logits,
            # A wrapper such as DDP reaches training_step through a call of the module itself.
            redirected=student is pl_module and trainer.strategy.model is not pl_module,
            foreign=own if self.teacher is None else (),
            stopwatch=self._calls,
        )

    def _student(self, pl_module: pl.LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.layer or "")
        except AttributeError:
            raise ValueError(
                f"layer must be the name of a submodule of {type(pl_module).__name__}, such as "
                f"{[name for name, _ in pl_module.named_children()]}, got {self.layer!r}"
            ) from None

    def _copied(
        self, trainer: pl.Trainer, student: nn.Module, restored: dict[str, Any]
    ) -> nn.Module:
        if trainer.strategy.restore_checkpoint_after_setup:
            raise ValueError(
                f"Distillation cannot copy a module that {type(trainer.strategy).__name__} shards: "
                "give it a teacher"
            )
        if "teacher" in restored and restored["teacher"] is None:
            raise ValueError("the checkpoint's run had a teacher of yours: give teacher again")
        twin = frozen_copy(student)
        if "teacher" in restored:
            load_tensors(twin, restored["teacher"])
        return twin

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the student for the length of this batch."""
        assert self._tap is not None
        self._batches.start()
        self._tap.open()

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Mix the distillation term into the loss."""
        assert self._tap is not None
        pairs = self._tap.pairs()
        if not pairs:
            raise ValueError(
                "Distillation saw no call of the student with gradients in training_step: call "
                "self(x), not self.forward(x), or set layer to the name of the submodule that it "
                f"calls for logits (layer={self.layer!r})"
            )
        self._tap.close()  # activation checkpointing calls the student again in backward
        losses = [distillation_loss(s, t, self.temperature, self.class_dim) for s, t in pairs]
        term = torch.stack(losses).mean()
        if trainer.loggers:
            pl_module.log("condensa/distillation_loss", term.detach(), on_step=True, on_epoch=False)
        term = term / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            term = scaler.scale(term)
        # Lightning made this tensor (by dividing and scaling the module's own) and runs backward
        # on it after this hook: changed in place it carries both terms, and hurts no one's graph.
        loss.mul_(1 - self.weight).add_(term, alpha=self.weight)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch again: some optimizers run several training steps in a batch."""
        assert self._tap is not None
        self._tap.open()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Leave the student alone until the next batch."""
        assert self._tap is not None
        self._tap.close()
        self._batches.stop()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report what the teacher cost."""
        self.teacher_seconds = self._calls.seconds()
        self.teacher_share = self.teacher_seconds / max(self._batches.seconds(), 1e-9)
        cost = {"teacher_seconds": self.teacher_seconds, "teacher_share": self.teacher_share}
        for logger in trainer.loggers:
            metrics = {f"condensa/{name}": value for name, value in cost.items()}
            logger.log_metrics(metrics, step=trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send the teacher home; a copy waits on the CPU for checkpoints still to be written."""
        self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Clean up as at the end of ``fit``."""
        self._release()

    def _release(self) -> None:
        if self._tap is not None:
            self._tap.close()
        if self._guest is not None:
            self._guest.leave()
        self._tap = self._guest = None

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The tensors of a copied teacher; ``None`` for one that was given."""
        if self.teacher is not None:
            return {"teacher": None}
        return {} if self._copy is None else {"teacher": tensors_of(self._copy)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the teacher of an interrupted run when ``fit`` starts."""
        self._restored = state_dict
