"""The published schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_condensa.lc.arguments import check_int, check_range
from lightning_condensa.lc.plan import Plan, Schedule


@dataclass(frozen=True)
class PaperSchedule(Schedule):
    """The published algorithm and its schedules (arXiv:1911.02497 §4 and the reference code).

    The first of ``steps`` iterations only compresses; in the second μ is ``mu_init`` and the
    L-step has ``mb_iterations_first_l`` mini-batches. A run ends with its last C-step; where the
    Trainer has more steps left, the last L-step goes on.

    Attributes:
        steps: L-C iterations.
        mb_iterations_per_l: Mini-batches in an L-step; ``None`` fills the Trainer's steps.
        mb_iterations_first_l: Mini-batches in the first L-step; ``None`` for the same number.
        lr: Learning rate at the start; ``None`` leaves the learning rate to the user.
        lr_end: Learning rate at the end of every L-step, approached geometrically.
        lr_decay: Factor on ``lr`` from one L-C iteration to the next.
        lr_schedule: Iterations after which ``lr`` is multiplied by ``lr_multiplier``.
        lr_multiplier: Factor for ``lr_schedule``.
        mu_init: μ of the first penalized L-step.
        mu_multiplier: Growth of μ per iteration.
        mu_cap: μ stops growing once it exceeds this.
    """

    steps: int = 30
    mb_iterations_per_l: int | None = None
    mb_iterations_first_l: int | None = None
    lr: float | None = None
    lr_end: float | None = None
    lr_decay: float | None = None
    lr_schedule: Sequence[int] | None = None
    lr_multiplier: float | None = None
    mu_init: float = 1e-3
    mu_multiplier: float = 1.1
    mu_cap: float = 10_000.0

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 2)
        for name in ("mb_iterations_per_l", "mb_iterations_first_l"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        check_range("mu_init", self.mu_init, 0, math.inf, open_low=True)
        check_range("mu_multiplier", self.mu_multiplier, 1, math.inf)
        for name in ("lr", "lr_end", "lr_decay", "lr_multiplier"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, math.inf, open_low=True)
        if self.lr is None and (self.lr_end, self.lr_decay, self.lr_schedule) != (None, None, None):
            raise ValueError("lr_end, lr_decay and lr_schedule need lr, got lr=None")
        if (self.lr_schedule is None) != (self.lr_multiplier is None):
            raise ValueError("lr_schedule and lr_multiplier go together")

    def plan(
        self,
        total_steps: int,
        *,
        prunes: bool = True,
        projects: bool = False,
        rounds: bool = False,
        steps_per_epoch: int | None = None,
    ) -> Plan:
        """One C-step before training and one after each of ``steps − 1`` L-steps."""
        per_l = self.mb_iterations_per_l
        if per_l is None:
            per_l = max((total_steps - (self.mb_iterations_first_l or 0)) // (self.steps - 1), 1)
        first = self.mb_iterations_first_l or per_l
        needed = first + (self.steps - 2) * per_l
        if needed > total_steps:
            raise ValueError(
                f"the paper's schedule needs {needed} optimizer steps (steps={self.steps}, "
                f"mb_iterations_first_l={first}, mb_iterations_per_l={per_l}), "
                f"the Trainer runs {total_steps}"
            )
        c_steps = (0, *(first + i * per_l for i in range(self.steps - 1)))
        if self.mb_iterations_per_l is None:  # the last L-step takes what division left over
            c_steps = (*c_steps[:-1], total_steps)
        mu = [self.mu_init]
        while len(mu) < self.steps:
            mu.append(mu[-1] if mu[-1] > self.mu_cap else mu[-1] * self.mu_multiplier)
        return Plan(
            c_steps=c_steps,
            progress=(1.0,) * self.steps,
            strength=tuple(mu),
            proximal=False,
            finetune_from=None,
            window=1,
            reset_optimizer=True,
            learning_rate=None if self.lr is None else self._learning_rate(c_steps),
        )

    def _learning_rate(self, c_steps: tuple[int, ...]) -> Callable[[int], float]:
        lr = self.lr
        assert lr is not None

        def at(step: int) -> float:
            iteration = next((i for i, c in enumerate(c_steps) if c > step), len(c_steps) - 1)
            start = lr
            if self.lr_decay is not None:
                start *= self.lr_decay**iteration
            elif self.lr_schedule is not None and self.lr_multiplier is not None:
                passed = sum(i < iteration for i in self.lr_schedule)
                start *= self.lr_multiplier**passed
            if self.lr_end is None:
                return start
            begin, end = c_steps[iteration - 1], c_steps[iteration]
            passed_share = min((step - begin) / (end - begin), 1.0)
            return float(start * (self.lr_end / start) ** passed_share)

        return at
