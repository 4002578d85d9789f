"""When C-steps happen, how the penalty grows, how the density ramps, where fine-tuning starts.

A schedule is a small immutable value; given the number of optimizer steps of a run it becomes a
:class:`~lightning_condensa.lc.Plan`, plain numbers that the callback follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_condensa.lc.arguments import check_int, check_range
from lightning_condensa.lc.paper import PaperSchedule
from lightning_condensa.lc.plan import Plan, Schedule
from lightning_condensa.lc.ramps import Ramp, as_ramp

#: L-steps in a run, and the most optimizer steps in one where weights are only rounded.
_L_STEPS, _ROUNDING = 60, 8


@dataclass(frozen=True)
class LCSchedule(Schedule):
    """The default: many short L-steps, a density ramp, a proximal penalty, a masked fine-tune.

    What the scheme prunes is pulled to zero after the optimizer's step by the penalty's proximal
    operator, which removes the share ``prune_rate = μ·lr/(1 + μ·lr)`` of it: the same for every
    optimizer, and out of gradient clipping and of Adam's statistics. At a rate of 1 the constraint
    holds after each step and needs no multipliers. What the scheme rounds, or otherwise projects,
    is trained through the projection: the optimizer moves a latent weight, and the network computes
    with a weight on the way from there to Δ(θ), further along in each L-step and there at the end.

    The C-step of a pruning scheme is a projection in a metric that knows the loss: it ranks
    ``|w|·(E[g²])^(importance/2)``, where ``E[g²]`` is the mean squared gradient of each weight over
    the last optimizer steps. 0 is plain magnitude, as published; 1 is the diagonal Fisher
    information of optimal brain damage.

    What is left of a pruned network wants longer steps: where each unit sums fewer inputs, a change
    of its weights moves its output less. Under the sparse maximal update parameterization (Dey et
    al. 2024, arXiv:2405.15743) the learning rate of a network that is sparse from its start grows
    as ``1/density``. Here each optimizer step is made at ``lr · density^(−lr_exponent)``, with the
    learning rate that the user's optimizer and schedulers have for it and the density of the last
    C-step. ``docs/lc.md`` has the measurements behind the defaults.

    Attributes:
        l_steps: L-steps in the L-C phase, evenly spread; ``None`` for 60, and more in a long run
            whose scheme only rounds: then none is longer than eight optimizer steps.
        every_n_steps: Optimizer steps from one C-step to the next, instead of ``l_steps``.
        every_n_epochs: Epochs from one C-step to the next, instead of ``l_steps``.
        rate_start: How far weights are on the way to what the scheme rounds them to in the first
            L-step, in [0, 1]; ``None`` for a half, or 0 where it prunes too. Weights that are moved
            instead (low rank) begin at 0.
        rate_end: The same in the last one, for both; it grows linearly.
        prune_rate: Rate for weights that are pruned; at 1 they are zero at once and stay out.
        ramp: Share of the L-C phase over which the density falls from dense to the scheme's.
        shape: Of that fall: a power, the one of a
            :class:`~lightning_condensa.lc.PolynomialRamp`, or a function of [0, 1] to [0, 1].
        finetune: Share of all steps for fine-tuning on the final support.
        importance: Exponent of the gradient in the metric of the C-step, in [0, 2].
        window: Optimizer steps before a C-step over which squared gradients are averaged.
        lr_exponent: How much the learning rate rises while the network gets sparse, in [0, 1]; with
            0 it is the user's own.
        reset_optimizer: Whether the optimizer's state is forgotten at each C-step. The state of
            weights that are pruned for good always is.
    """

    l_steps: int | None = None
    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    rate_start: float | None = None
    rate_end: float = 1.0
    prune_rate: float = 1.0
    ramp: float = 1.0
    shape: float | Ramp = 6.0
    finetune: float = 0.3
    importance: float = 0.35
    window: int = 8
    lr_exponent: float = 0.25
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        check_int("window", self.window, 1)
        for name in ("l_steps", "every_n_steps", "every_n_epochs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if self.every_n_steps is not None and self.every_n_epochs is not None:
            raise ValueError(
                "give every_n_steps or every_n_epochs, not both, "
                f"got {self.every_n_steps} and {self.every_n_epochs}"
            )
        check_range("prune_rate", self.prune_rate, 0, 1, open_low=True)
        if self.rate_start is not None:
            check_range("rate_start", self.rate_start, 0, 1)
        for name in ("rate_end", "ramp", "finetune", "lr_exponent"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("importance", self.importance, 0, 2)
        as_ramp(self.shape)

    def plan(
        self,
        total_steps: int,
        *,
        prunes: bool = True,
        projects: bool = False,
        rounds: bool = False,
        steps_per_epoch: int | None = None,
    ) -> Plan:
        """Lay the C-steps evenly; where values are projected, they go on in the fine-tune phase."""
        l_end = round(total_steps * (1 - self.finetune)) if prunes else total_steps
        interval = self._interval(steps_per_epoch)
        wanted = self.l_steps or _L_STEPS
        if self.l_steps is None and rounds and not prunes:
            wanted = max(wanted, math.ceil(l_end / _ROUNDING))
        c_steps = _c_steps(l_end, interval, wanted)
        l_steps = len(c_steps) - 1
        if projects and l_end < total_steps:
            if interval is None:  # as in the L-C phase, if there is one
                interval = max(round(l_end / l_steps if l_steps else total_steps / wanted), 1)
            c_steps = (*c_steps, *range(l_end + interval, total_steps, interval), total_steps)
        ramp, ramp_steps = as_ramp(self.shape), self.ramp * l_steps
        last = max(len(c_steps) - 2, 1)  # the last C-step ends the run: no L-step follows
        done = [min(i / last, 1.0) for i in range(len(c_steps))]
        start = self.rate_start
        if start is None:
            start = 0.0 if prunes else min(0.5, self.rate_end)
        return Plan(
            c_steps=c_steps,
            progress=tuple(
                min(max(ramp(i / ramp_steps), 0.0), 1.0) if i < ramp_steps else 1.0
                for i in range(len(c_steps))
            ),
            strength=tuple(self.rate_end * share for share in done),
            rounding=tuple(start + (self.rate_end - start) * share for share in done),
            proximal=True,
            finetune_from=l_end if prunes else None,
            prune_rate=self.prune_rate,
            importance=self.importance if prunes else 0.0,
            window=self.window,
            lr_exponent=self.lr_exponent if prunes else 0.0,
            reset_optimizer=self.reset_optimizer,
        )

    def _interval(self, steps_per_epoch: int | None) -> int | None:
        if self.every_n_epochs is None:
            return self.every_n_steps
        if steps_per_epoch is None:
            raise ValueError("every_n_epochs needs epochs of a known length; use every_n_steps")
        return self.every_n_epochs * steps_per_epoch


def _c_steps(last: int, interval: int | None, wanted: int) -> tuple[int, ...]:
    if interval is not None or last == 0:
        return (*range(0, last, interval or 1), last)
    l_steps = min(wanted, last)
    return tuple(round(i * last / l_steps) for i in range(l_steps + 1))


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
