"""Ending a trial that can no longer reach the level, judged by the curves of those that ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn
from scipy.stats import t as student  # type: ignore[import-untyped]

from lightning_condensa.callbacks.horizon import planned_steps
from lightning_condensa.callbacks.snapshot import measured

if TYPE_CHECKING:
    from lightning_condensa.search.store import Record

__all__ = ["AbortRule", "CurveWatch"]

#: Trials that start the same way and were trained to their end, before any is aborted.
LEAST_CURVES = 4
#: Probability of reaching the level that is too little to go on.
_CHANCE = 0.005
#: What is believed of the errors before any trial, and how many trials that is worth.
_PRIOR_SD, _PRIOR_TRIALS = 0.5, 3

Curve = Sequence[Sequence[float]]


@dataclass(frozen=True)
class AbortRule:
    """Predicts the metric at the end of training from that in the middle; plain data, for workers.

    On a scale that is linear near the level and logarithmic far from it,
    ``y = sign(c) log(1 + |c|)``, ``c = (metric - target) / scale``, the metric at the end is taken
    to be a linear function of the best one so far, the same for all trials that start the same
    way, with normal errors. Fitted to the trials that ended, at the same progress, it predicts by
    a t distribution: ``n - 2`` degrees of freedom, and three of a prior of errors with a standard
    deviation of 1/2. It is wide for few trials, and wider for one that is worse than all of them.

    Attributes:
        curves: Of each trial that ended: ``(progress, metric)`` pairs, the last of them its end.
        target: The metric to reach.
        sign: 1 where more of the metric is better, else -1.
        scale: What counts as a small difference of the metric, > 0.
        noise: Standard deviation of one measurement of it.
    """

    curves: tuple[Curve, ...]
    target: float
    sign: float
    scale: float
    noise: float

    @classmethod
    def learned(
        cls, records: Iterable[Record], warm: bool, *, target: float, sign: float,
        tolerance: float, variance: float,
    ) -> AbortRule | None:  # fmt: skip
        """The rule for the next trial; ``None`` while there is too little evidence.

        Args:
            records: Trials that ended; those that were trained to their end count.
            warm: Whether the trial starts from another's model; the others must have, too.
            target: The metric to reach.
            sign: 1 where more of the metric is better, else -1.
            tolerance: How far the metric may be from the dense model's.
            variance: Of one measurement.
        """
        curves = [
            [*r.outcome.curve, (1.0, r.outcome.metric)]
            for r in records
            if r.outcome.status == "complete"
            and r.outcome.metric is not None
            and r.outcome.curve
            and (r.outcome.parent is not None) == warm
        ]
        if len(curves) < LEAST_CURVES:
            return None
        noise = math.sqrt(variance)
        scale = max(tolerance, noise, 1e-9 * max(1.0, abs(target)))
        return cls(tuple(curves), target, sign, scale, noise)

    def ceiling(self, progress: float, metric: float) -> float:
        """What the metric at the end stays on this side of, but for a chance of half a percent.

        Args:
            progress: Share of the training that is done.
            metric: The best metric so far.

        Returns:
            On the metric's scale; infinitely good where nothing can be said.
        """
        pairs = [
            (self._slack(so_far), self._slack(curve[-1][1]))
            for curve in self.curves
            if (so_far := self._best(curve, progress)) is not None
        ]
        n = len(pairs)
        if n < LEAST_CURVES or not math.isfinite(metric):
            return self.sign * math.inf
        x0 = self._slack(metric)
        mean_x, mean_y = (sum(values) / n for values in zip(*pairs, strict=True))
        spread = sum((x - mean_x) ** 2 for x, _ in pairs)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / max(spread, 1e-12)
        slope = max(slope, 0.0)  # early on, noise alone may say that the worse end better
        squares = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in pairs)
        freedom = n - 2 + _PRIOR_TRIALS
        # No fit is better than what it is made of: two measurements near the level.
        variance = max(
            (squares + _PRIOR_TRIALS * _PRIOR_SD**2) / freedom, 2 * (self.noise / self.scale) ** 2
        )
        away = (x0 - mean_x) ** 2 / max(spread, 1e-12)
        sd = math.sqrt(variance * (1 + 1 / n + away))
        # Trained to its end, a trial keeps the best model that it had.
        center = max(mean_y + slope * (x0 - mean_x), x0)
        highest = center + float(student.ppf(1 - _CHANCE, freedom)) * sd
        if highest > 700:  # beyond what exp can take
            return self.sign * math.inf
        return self.target + self.sign * self.scale * math.copysign(
            math.expm1(abs(highest)), highest
        )

    def hopeless(self, ceiling: float) -> bool:
        """Whether such a ceiling is short of the target."""
        return self.sign * (ceiling - self.target) < 0

    def best(self, metrics: Iterable[float]) -> float:
        """The best of some metrics."""
        return self.sign * max(self.sign * m for m in metrics)

    def _best(self, curve: Curve, progress: float) -> float | None:
        """The best metric of a curve up to some progress, its end left out."""
        seen = [metric for at, metric in curve[:-1] if at <= progress + 1e-9]
        return self.best(seen) if seen else None

    def _slack(self, metric: float) -> float:
        c = self.sign * (metric - self.target) / self.scale
        return math.copysign(math.log1p(abs(c)), c)


class CurveWatch(pl.Callback):
    """Keeps the compressed model's metric over a trial, and ends it where a rule says so.

    Args:
        metric: A metric that the module logs in validation.
        rule: ``None`` to watch only.

    Attributes:
        curve: ``[progress, metric]`` of each validation with a finite metric.
    """

    def __init__(self, metric: str, rule: AbortRule | None) -> None:
        self.metric, self.rule = metric, rule
        self.curve: list[list[float]] = []
        self._planned = 1
        self._stopped: tuple[float, float] | None = None

    @property
    def bound(self) -> float | None:
        """What the metric would have stayed short of; ``None`` for a trial that was not ended."""
        if self._stopped is None or not self.curve or self.curve[-1][0] >= 1:
            return None  # ``min_epochs`` may have let it go on to its end
        return self._stopped[1]

    @property
    def message(self) -> str:
        """Why it was ended; empty where it was not."""
        if self.bound is None or self._stopped is None or self.rule is None:
            return ""
        sign = "<" if self.rule.sign > 0 else ">"
        return (
            f"aborted at {self._stopped[0]:.0%}: {self.metric} would end {sign} {self.bound:.4g}, "
            f"short of {self.rule.target:.4g}"
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know how long the training is."""
        in_step = 1 if pl_module.automatic_optimization else max(len(trainer.optimizers), 1)
        self._planned = in_step * planned_steps(trainer, pl_module, 0, 0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the metric, and judge."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.metric not in trainer.callback_metrics:
            return
        value = measured(trainer, self.metric)
        if not math.isfinite(value):
            return
        progress = min(trainer.global_step / self._planned, 1.0)
        self.curve.append([progress, value])
        if self.rule is None or self._stopped is not None or progress >= 1:
            return
        ceiling = self.rule.ceiling(progress, self.rule.best(m for _, m in self.curve))
        if self.rule.hopeless(ceiling):
            self._stopped = progress, ceiling
            trainer.should_stop = True
