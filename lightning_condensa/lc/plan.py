"""An L-C run in numbers, and what makes one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """An L-C run in numbers. Steps are the user's optimizer steps, counted from 0.

    Attributes:
        c_steps: How many optimizer steps precede each C-step; the first is 0, before training.
        progress: Position of each C-step on the ramp from dense (0) to the scheme (1).
        strength: Of the pull on w at and after each C-step: μ where it is a gradient; else the
            share of the way to Δ(θ) that a weight is moved.
        proximal: Whether w is kept to θ beside the optimizer's steps; else ``μ(w − Δ(θ)) − λ`` is
            added to the gradient before them.
        finetune_from: Optimizer steps after which the support stays as it is; ``None`` for never.
        prune_rate: Share of a pruned weight that one optimizer step removes (proximal only).
        importance: Exponent of the mean squared gradient's root in the metric of the C-step.
        window: Optimizer steps before a C-step over which squared gradients are averaged.
        lr_exponent: The learning rate counts ``density^(−lr_exponent)`` times.
        reset_optimizer: Whether the optimizer's state is forgotten at each C-step.
        learning_rate: Learning rate by optimizer step, or ``None``: the user's own.
        rounding: How far rounded weights are on the way from their latent ones to Δ(θ) after each
            C-step (proximal only); empty: as ``strength``.
    """

    c_steps: tuple[int, ...]
    progress: tuple[float, ...]
    strength: tuple[float, ...]
    proximal: bool
    finetune_from: int | None
    prune_rate: float = 1.0
    importance: float = 0.0
    window: int = 0
    lr_exponent: float = 0.0
    reset_optimizer: bool = False
    learning_rate: Callable[[int], float] | None = None
    rounding: tuple[float, ...] = ()

    @property
    def l_end(self) -> int:
        """Optimizer steps in the L-C phase."""
        return self.c_steps[-1] if self.finetune_from is None else self.finetune_from


class Schedule(ABC):
    """Turns a number of optimizer steps into a plan."""

    @abstractmethod
    def plan(
        self,
        total_steps: int,
        *,
        prunes: bool = True,
        projects: bool = False,
        rounds: bool = False,
        steps_per_epoch: int | None = None,
    ) -> Plan:
        """The plan for a run of ``total_steps`` optimizer steps.

        Args:
            total_steps: Optimizer steps to come.
            prunes: Whether the scheme prunes, so that there is a support to fine-tune on.
            projects: Whether the scheme changes the values that it keeps, by rounding say.
            rounds: Whether rounding is all that it does to them.
            steps_per_epoch: Optimizer steps in an epoch, for schedules that count in epochs.
        """
