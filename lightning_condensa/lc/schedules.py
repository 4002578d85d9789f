"""When C-steps happen, how μ grows, how the density ramps, where fine-tuning starts.

A schedule is a small immutable value; given the number of optimizer steps of a run it becomes a
:class:`Plan`, plain numbers that the callback follows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Plan:
    """An L-C run in numbers. Steps are the user's optimizer steps, counted from 0.

    Attributes:
        c_steps: How many optimizer steps precede each C-step; the first is 0, before training.
        progress: Position of each C-step on the ramp from dense (0) to the scheme (1).
        mu: μ of the L-step after each C-step, in units of the base that the run starts from:
            1 where ``mu`` is absolute, the optimizer's measured rate otherwise.
        absolute_mu: Whether :attr:`mu` is absolute.
        dual_step: Step length of λ at each C-step, in [0, 1].
        reset_optimizer: Whether the optimizer's state is forgotten at each C-step.
        finetune_from: Optimizer steps after which only the support is trained.
        learning_rate: Learning rate by optimizer step, or ``None``: the user's own.
    """

    c_steps: tuple[int, ...]
    progress: tuple[float, ...]
    mu: tuple[float, ...]
    absolute_mu: bool
    dual_step: tuple[float, ...]
    reset_optimizer: bool
    finetune_from: int
    learning_rate: Callable[[int], float] | None = None


class Schedule(ABC):
    """Turns a number of optimizer steps into a plan."""

    @abstractmethod
    def plan(
        self, total_steps: int, finetune: bool = True, steps_per_epoch: int | None = None
    ) -> Plan:
        """The plan for a run of ``total_steps`` optimizer steps.

        Args:
            total_steps: Optimizer steps to come.
            finetune: Whether the scheme prunes, so that there is a support to fine-tune on;
                without one C-steps go on to the end.
            steps_per_epoch: Optimizer steps in an epoch, for schedules that count in epochs.
        """


@dataclass(frozen=True)
class LCSchedule(Schedule):
    """The default: many short L-steps, a density ramp, automatic μ, a masked fine-tune.

    μ is given as a *rate*, the share of the distance to Δ(θ) that one optimizer step removes: for
    plain SGD ``rate = μ · lr``. The optimizer's response (step length per gradient length) is
    measured on the first step, so the same rates serve SGD and Adam.

    Attributes:
        l_steps: L-steps in the L-C phase, evenly spread.
        every_n_steps: Optimizer steps from one C-step to the next, instead of ``l_steps``.
        every_n_epochs: Epochs from one C-step to the next, instead of ``l_steps``.
        rate_start: Rate in the first L-step.
        rate_end: Rate in the last L-step; the growth is geometric.
        ramp: Share of the L-C phase over which the density falls, cubically (Zhu & Gupta,
            arXiv:1710.01878), from dense to the scheme's.
        finetune: Share of all steps for fine-tuning on the final support.
        multipliers: Whether λ is used, with a step as long as an L-step can follow; without it
            this is the quadratic penalty method.
        reset_optimizer: Whether the optimizer's state is forgotten at each C-step.
    """

    l_steps: int = 60
    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    rate_start: float = 2.5e-3
    rate_end: float = 0.1
    ramp: float = 0.8
    finetune: float = 0.3
    multipliers: bool = True
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        _check_int("l_steps", self.l_steps, 1)
        for name in ("every_n_steps", "every_n_epochs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        if self.every_n_steps is not None and self.every_n_epochs is not None:
            raise ValueError(
                "give every_n_steps or every_n_epochs, not both, "
                f"got {self.every_n_steps} and {self.every_n_epochs}"
            )
        for name in ("rate_start", "rate_end"):
            _check_range(name, getattr(self, name), 0, math.inf, open_low=True)
        _check_range("ramp", self.ramp, 0, 1)
        _check_range("finetune", self.finetune, 0, 1)

    def plan(
        self, total_steps: int, finetune: bool = True, steps_per_epoch: int | None = None
    ) -> Plan:
        """Lay the C-steps over the steps before fine-tuning; the last one ends that phase."""
        finetune_from = round(total_steps * (1 - self.finetune)) if finetune else total_steps
        c_steps = self._c_steps(finetune_from, steps_per_epoch)
        l_steps = len(c_steps) - 1
        ramp_steps = self.ramp * l_steps
        growth = (self.rate_end / self.rate_start) ** (1 / max(l_steps - 1, 1))
        rates = tuple(self.rate_start * growth**i for i in range(l_steps + 1))
        return Plan(
            c_steps=c_steps,
            progress=tuple(
                1 - (1 - i / ramp_steps) ** 3 if i < ramp_steps else 1.0 for i in range(l_steps + 1)
            ),
            mu=rates,
            absolute_mu=False,
            dual_step=self._dual_steps(c_steps, rates),
            reset_optimizer=self.reset_optimizer,
            finetune_from=finetune_from,
        )

    def _dual_steps(self, c_steps: tuple[int, ...], rates: tuple[float, ...]) -> tuple[float, ...]:
        """The share of the gap that each L-step can close: λ counts no more of what is left.

        A full step presumes a solved L-step. After a few iterations most of the gap is still
        there because there was no time, and λ would wind up on it.
        """
        if not self.multipliers:
            return (0.0,) * len(c_steps)
        lengths = (b - a for a, b in pairwise(c_steps))
        steps = (1 - (1 - min(r, 1.0)) ** n for r, n in zip(rates, lengths, strict=False))
        return (0.0, *steps)

    def _c_steps(self, last: int, steps_per_epoch: int | None) -> tuple[int, ...]:
        interval = self.every_n_steps
        if self.every_n_epochs is not None:
            if steps_per_epoch is None:
                raise ValueError("every_n_epochs needs epochs of a known length; use every_n_steps")
            interval = self.every_n_epochs * steps_per_epoch
        if interval is not None:
            return (*range(0, max(last, 1), interval), last)
        l_steps = min(self.l_steps, max(last, 1))
        return tuple(round(i * last / l_steps) for i in range(l_steps + 1))


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
        _check_int("steps", self.steps, 2)
        for name in ("mb_iterations_per_l", "mb_iterations_first_l"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        _check_range("mu_init", self.mu_init, 0, math.inf, open_low=True)
        _check_range("mu_multiplier", self.mu_multiplier, 1, math.inf)
        for name in ("lr", "lr_end", "lr_decay", "lr_multiplier"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), 0, math.inf, open_low=True)
        if self.lr is None and (self.lr_end, self.lr_decay, self.lr_schedule) != (None, None, None):
            raise ValueError("lr_end, lr_decay and lr_schedule need lr, got lr=None")
        if (self.lr_schedule is None) != (self.lr_multiplier is None):
            raise ValueError("lr_schedule and lr_multiplier go together")

    def plan(
        self, total_steps: int, finetune: bool = True, steps_per_epoch: int | None = None
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
            mu=tuple(mu),
            absolute_mu=True,
            dual_step=(1.0,) * self.steps,
            reset_optimizer=True,
            finetune_from=total_steps,
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


PRESETS: dict[str, type[LCSchedule] | type[PaperSchedule]] = {
    "default": LCSchedule,
    "paper": PaperSchedule,
}


def make_schedule(preset: str, schedule: Schedule | Mapping[str, Any] | None) -> Schedule:
    """The schedule of a preset, with some fields changed.

    Args:
        preset: A key of :data:`PRESETS`.
        schedule: Fields to change, or a whole schedule, which then is the result.

    Raises:
        ValueError: If the preset or a field is unknown, or a value is out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    if isinstance(schedule, Schedule):
        return schedule
    changes = dict(schedule or {})
    known = [f.name for f in fields(PRESETS[preset])]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ValueError(f"schedule of preset {preset!r} has no {unknown}; it has {known}")
    return PRESETS[preset](**changes)


def _check_int(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an int >= {low}, got {value!r}")


def _check_range(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or value in (math.inf, low if open_low else None):  # type: ignore[operator]
        left, right = "(" if open_low else "[", ")" if high == math.inf else "]"
        raise ValueError(f"{name} must be a number in {left}{low}, {high}{right}, got {value!r}")
