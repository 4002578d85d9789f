"""What a search strategy is told: the candidates, the level to keep, and what has been measured.

Nothing here knows of Optuna, Lightning or compression schemes: a candidate is a row of
coordinates with a known utility.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_condensa.search.domain import Domain
from lightning_condensa.search.observation import Observation

__all__ = ["Observation", "Problem", "best_feasible", "best_within", "nearest_miss"]


@dataclass(frozen=True)
class Problem:
    """Maximise a known utility over candidates whose feasibility has to be learned.

    Args:
        candidates: Coordinates of the candidates, shape ``[N, d]``, float64.
        utility: The known objective at the candidates, shape ``[N]``, higher is better; the
            logarithm of a positive objective, so that a difference is a relative gain.
        baseline: The uncompressed model, as an observation; it need not be a candidate.
        level: The metric a feasible point must reach.
        noise_variance: Variance of the metric of one evaluation.
        cliff: True when the one coordinate is ``u = -ln(density)`` and the metric behaves like an
            accuracy in [0, 1], so that the parametric cliff curves apply.
        z: Certification margin in standard deviations of the evaluation noise.
        domain: Several dimensions, of whose combinations more candidates can be made; the
            coordinates of ``candidates`` are its. None where the candidates are all there is.
        accuracy: True when, with a domain, the metric behaves like an accuracy in [0, 1], so that
            damages add up.
        scan: What the untrained network loses in each dimension by itself, shape ``[d]``: for a
            range the coordinate at which it loses the first points, for each option of a choice
            the loss; NaN where unknown. It need not be right.
        budget: The utility that a candidate must have. With one, the metric is maximized, and
            ``level`` is what counts as an improvement of it. None where the level must be kept.
        further: Known utilities of the candidates under further objectives, shape ``[N, m - 1]``;
            None where there is one objective.
        fidelity: True when, with a cliff, there is another and last coordinate: the share of the
            training, in (0, 1], that an evaluation takes.

    Raises:
        ValueError: If there are no candidates or a field contradicts another.

    Example:
        >>> u = torch.linspace(0.1, 5.0, 50, dtype=torch.float64)
        >>> dense = Observation(torch.zeros(1), metric=0.98, variance=1e-6, utility=0.0)
        >>> problem = Problem(u[:, None], u, dense, level=0.97, noise_variance=1e-6, cliff=True)
        >>> round(problem.tolerance, 3), problem.target
        (0.01, 0.97)
    """

    candidates: Tensor
    utility: Tensor
    baseline: Observation
    level: float
    noise_variance: float
    cliff: bool
    z: float = 0.0
    domain: Domain | None = None
    accuracy: bool = False
    scan: Tensor | None = None
    budget: float | None = None
    further: Tensor | None = None
    fidelity: bool = False

    def __post_init__(self) -> None:
        """Validate once, at the boundary."""
        if self.candidates.ndim != 2 or self.candidates.numel() == 0:
            raise ValueError(
                f"candidates must have shape [N, d] with N >= 1, got {list(self.candidates.shape)}"
            )
        n, d = self.candidates.shape
        if self.utility.shape != (n,):
            raise ValueError(f"utility must have shape [{n}], got {list(self.utility.shape)}")
        for name, value in (("candidates", self.candidates), ("utility", self.utility)):
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} must be finite")
            object.__setattr__(self, name, value.detach().to(torch.float64))
        if self.baseline.point.shape != (d,):
            raise ValueError(
                f"baseline must have a point of shape [{d}], got {list(self.baseline.point.shape)}"
            )
        if self.baseline.metric is None:
            raise ValueError("baseline must have a metric, got a diverged observation")
        if not (math.isfinite(self.noise_variance) and self.noise_variance >= 0):
            raise ValueError(f"noise_variance must be finite and >= 0, got {self.noise_variance}")
        if not (math.isfinite(self.level) and math.isfinite(self.z)):
            raise ValueError(f"level and z must be finite, got {self.level} and {self.z}")
        if self.cliff and (d != 1 + self.fidelity or not 0 < self.baseline.metric <= 1):
            raise ValueError(
                f"cliff needs one coordinate and a metric in (0, 1], got d={d} and a baseline "
                f"metric of {self.baseline.metric}"
            )
        if self.domain is not None and self.domain.width != d:
            raise ValueError(f"domain must have {d} coordinates, got {self.domain.width}")
        if self.accuracy and (self.domain is None or not 0 < self.baseline.metric <= 1):
            raise ValueError(
                "accuracy needs a domain and a metric in (0, 1], got a baseline metric of "
                f"{self.baseline.metric}"
            )
        if self.scan is not None and self.scan.shape != (d - self.fidelity,):
            raise ValueError(
                f"scan must have shape [{d - self.fidelity}], got {list(self.scan.shape)}"
            )
        if self.fidelity and not (self.cliff and self.budget is None and self.further is None):
            raise ValueError("fidelity needs cliff=True, a level to keep and one objective")
        shares = self.candidates[:, -1]
        if self.fidelity and not bool(((shares > 0) & (shares <= 1)).all()):
            raise ValueError(f"fidelity needs shares in (0, 1], got {sorted(set(shares.tolist()))}")
        if self.further is not None and self.further.shape != (n, len(self.baseline.further)):
            raise ValueError(
                f"further must have shape [{n}, {len(self.baseline.further)}], as many columns as "
                f"the baseline has further utilities, got {list(self.further.shape)}"
            )
        if self.budget is not None and not math.isfinite(self.budget):
            raise ValueError(f"budget must be finite (or None), got {self.budget}")
        if self.cliff and bool((self.candidates < 0).any()):
            raise ValueError("cliff needs candidates u = -ln(density) >= 0, got negative ones")

    @property
    def baseline_metric(self) -> float:
        """The metric of the uncompressed model."""
        assert self.baseline.metric is not None  # checked when built
        return self.baseline.metric

    @property
    def tolerance(self) -> float:
        """How far the metric may fall below the baseline's."""
        return self.baseline_metric - self.level

    @property
    def cost(self) -> Tensor:
        """What evaluating each candidate takes, in trainings, shape ``[N]``."""
        if self.fidelity:
            return self.candidates[:, -1]
        return torch.ones(len(self.candidates), dtype=torch.float64)

    @property
    def target(self) -> float:
        """The metric an evaluation must show to be certified: level + z standard deviations."""
        return self.level + self.z * math.sqrt(self.noise_variance)

    def with_share(self, share: float) -> Problem:
        """The problem in which each candidate may also be tried with a share of the training.

        Args:
            share: The last coordinate of the second half of the candidates; that of the first half
                and of the baseline is 1.

        Raises:
            ValueError: If the cliff curves do not apply.
        """
        n, point = len(self.candidates), self.baseline.point
        column = torch.tensor([1.0, share], dtype=torch.float64).repeat_interleave(n)
        return replace(
            self,
            candidates=torch.cat([self.candidates.repeat(2, 1), column[:, None]], dim=-1),
            utility=self.utility.repeat(2),
            baseline=replace(self.baseline, point=torch.cat([point, point.new_ones(1)])),
            fidelity=True,
        )

    def affordable(self, trainings: float) -> Problem:
        """The problem with what so many trainings pay for: a cheap trial with a full one after it.

        Raises:
            ValueError: If they pay for nothing.
        """
        needed = self.cost + (self.cost < 1)
        return self.only(needed <= trainings + 1e-9)

    def only(self, kept: Tensor) -> Problem:
        """The problem with the candidates marked in ``kept`` [N], at least one of them."""
        further = None if self.further is None else self.further[kept]
        return replace(
            self, candidates=self.candidates[kept], utility=self.utility[kept], further=further
        )

    def utility_at(self, points: Tensor) -> Tensor:
        """The known utility of ``points``, that of the nearest candidate or combination each.

        Args:
            points: Shape ``[..., d]``.

        Returns:
            Shape ``[...]``.
        """
        flat = points.reshape(-1, points.shape[-1]).to(self.candidates)
        if self.domain is not None:
            return self.domain.utility(self.domain.nearest(flat)).view(points.shape[:-1])
        return self.utility[self.nearest(flat)].reshape(points.shape[:-1])

    def nearest(self, points: Tensor) -> Tensor:
        """Index of the candidate nearest to each row of ``points`` [M, d]; shape ``[M]``."""
        return torch.cdist(points.to(self.candidates), self.candidates).argmin(dim=-1)

    @property
    def utilities(self) -> Tensor:
        """The known utilities of the candidates under all objectives, shape ``[N, m]``."""
        own = self.utility.unsqueeze(-1)
        return own if self.further is None else torch.cat([own, self.further.to(own)], dim=-1)

    def utilities_at(self, points: Tensor) -> Tensor:
        """The same of the candidates or combinations nearest to ``points`` [M, d]; ``[M, m]``."""
        if self.domain is not None:
            return self.domain.utilities(self.domain.nearest(points))
        return self.utilities[self.nearest(points)]

    def utilities_of(self, observation: Observation) -> Tensor:
        """The utilities of an observation under all objectives, shape ``[m]``.

        Those measured; the known ones where there are none.
        """
        count = 0 if self.further is None else self.further.shape[-1]
        if observation.utility is None or len(observation.further) != count:
            return self.utilities_at(observation.point[None])[0]
        return torch.tensor([observation.utility, *observation.further], dtype=torch.float64)

    def utility_of(self, observation: Observation) -> float:
        """The utility measured for ``observation``, or the known one where none was measured."""
        if observation.utility is not None:
            return observation.utility
        return float(self.utility_at(observation.point))


def best_feasible(observations: Sequence[Observation], level: float, z: float = 0.0) -> int | None:
    """Index of the observation of greatest utility among the feasible ones.

    Args:
        observations: Finished evaluations; those without a measured utility cannot be ranked and
            do not take part.
        level: The metric to reach.
        z: Margin in standard deviations of each observation's own noise.

    Returns:
        The index, the first of equals; None when nothing is feasible.

    Example:
        >>> def seen(u, metric):
        ...     return Observation(torch.tensor([u]), metric, 1e-6, utility=u)
        >>> best_feasible([seen(1.0, 0.98), seen(2.0, 0.97), seen(3.0, 0.60)], level=0.97)
        1
    """
    ranked = [
        (observation.utility, -index)
        for index, observation in enumerate(observations)
        if observation.utility is not None and observation.feasible(level, z)
    ]
    return -max(ranked)[1] if ranked else None


def best_within(observations: Sequence[Observation], budget: float) -> int | None:
    """Index of the observation of greatest metric among those within a budget.

    Args:
        observations: Finished evaluations; those without a measured utility do not take part.
        budget: The utility that it must have.

    Returns:
        The index, the first of equals; None when nothing is within the budget.

    Example:
        >>> def seen(u, metric):
        ...     return Observation(torch.tensor([u]), metric, 1e-6, utility=u)
        >>> best_within([seen(1.0, 0.98), seen(2.0, 0.97), seen(3.0, 0.60)], budget=1.5)
        1
    """
    within = [
        (observation.metric, -index)
        for index, observation in enumerate(observations)
        if observation.metric is not None
        and observation.utility is not None
        and observation.utility >= budget
    ]
    return -max(within)[1] if within else None


def nearest_miss(observations: Sequence[Observation]) -> int | None:
    """Index of the observation of greatest metric, for when nothing is feasible.

    Returns:
        The index, the first of equals; None when every observation diverged.
    """
    measured = [
        (observation.metric, -index)
        for index, observation in enumerate(observations)
        if observation.metric is not None
    ]
    return -max(measured)[1] if measured else None
