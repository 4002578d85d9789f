"""Synthetic accuracy cliffs: cheap problems with known answers, to test and compare strategies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_condensa.search.problem import Observation, Problem

__all__ = ["Family", "SyntheticCliff"]

Family = Literal["power", "logistic", "odds", "two_slope", "staircase"]
"""Shapes of the cliff: a power law and a logistic in ``u``, a power of the odds ``s / (1 - s)``,
two straight lines in ``u``, and steps, as if one layer after the other were lost."""

#: The surrogate was built with these in view; steps are what it has not seen.
_KNOWN: tuple[Family, ...] = ("power", "logistic", "odds", "two_slope")

_SPARSITIES = {
    "memory": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995),
    "throughput": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
}
_CHANNELS = 256
_MULTIPLE = 16
_OVERHEAD = 0.002
#: After a share ``s`` of the training the cliff is at ``u s^a``; ranges of ``a``, the second one of
#: problems in which less training misleads.
_NEARER, _MUCH_NEARER = (0.015, 0.34), (0.66, 1.3)
#: What a share of the training loses besides, up to the cliff.
_UNTRAINED = 0.005


@dataclass(frozen=True)
class SyntheticCliff:
    """One problem: a true accuracy curve, frozen noise, and a known objective.

    Noise is drawn once for every candidate, so that all strategies see the same value at the same
    point.

    Args:
        candidates: ``u = -ln(density)`` of the candidates, shape ``[N]``.
        accuracy: True accuracy at the candidates, shape ``[N]``.
        noise: Error of the accuracy at each, shape ``[N]``.
        utility: Logarithm of the true objective, shape ``[N]``.
        measured: The same as a strategy knows it, shape ``[N]``.
        baseline: Accuracy of the dense model.
        tolerance: Accuracy that may be lost.
        noise_sd: Standard deviation of ``noise``.
        share: Of the training. Below 1, each candidate stands for all of the training, and in the
            second half of every tensor once more for this share.

    Example:
        >>> case = SyntheticCliff.draw(seed=0, objective="memory")
        >>> problem = case.problem()
        >>> seen = case.observe(len(case.candidates) - 1)
        >>> seen.feasible(problem.level)
        False
    """

    candidates: Tensor
    accuracy: Tensor
    noise: Tensor
    utility: Tensor
    measured: Tensor
    baseline: float
    tolerance: float
    noise_sd: float
    share: float = 1.0

    @classmethod
    def draw(
        cls,
        seed: int,
        objective: Literal["memory", "throughput"] = "memory",
        family: Family | None = None,
        share: float = 1.0,
        misleading: bool = False,
    ) -> SyntheticCliff:
        """Draw a problem; without a family, one of the first four that follows from the seed.

        The cliff lies at a sparsity of 0.3 to 0.995 for ``"memory"`` (bytes of the kept weights
        and a fixed overhead) and 0.3 to 0.95 for ``"throughput"`` (time in steps of 16 of 256
        channels, known up to 1 to 3 %); noise is 0.1 to 0.5 % and the tolerance 0.5 to 2 points.

        After a quarter of the training the cliff lies at a ``u`` 1.02 to 1.6 times nearer, where
        that is ``misleading`` 2.5 to 6 times, after another ``share`` by a power law; up to half a
        point is lost besides.
        """
        generator = torch.Generator().manual_seed(seed)

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand(1, generator=generator))

        sparsities = _SPARSITIES[objective]
        sparsity = sparsities[int(torch.randint(len(sparsities), (1,), generator=generator))]
        if objective == "memory":
            u = torch.linspace(0.02, math.log(500), 300, dtype=torch.float64)
            utility = -torch.log(_OVERHEAD + (1 - _OVERHEAD) * torch.exp(-u))
            measured = utility
        else:
            kept = torch.arange(_CHANNELS - 1, 7, -1, dtype=torch.float64)
            u = -torch.log(kept / _CHANNELS)
            paid = (kept / _MULTIPLE).ceil() * _MULTIPLE / _CHANNELS
            utility = -torch.log(0.05 + 0.95 * paid ** uniform(1.0, 2.0))
            jitter = torch.randn(len(u), generator=generator, dtype=torch.float64)
            measured = utility + uniform(0.01, 0.03) * jitter
        baseline, noise_sd = uniform(0.7, 0.99), uniform(0.001, 0.005)
        location = -math.log1p(-sparsity)
        full, less = u, torch.Generator().manual_seed(10**6 + seed)  # no other draw is changed
        if share < 1:
            low, high = _MUCH_NEARER if misleading else _NEARER
            power = low + (high - low) * float(torch.rand(1, generator=less))
            u = torch.cat([full, full * share**-power])
        z = u / location
        depth = (baseline - 0.1) * uniform(0.8, 1.0)
        match family or _KNOWN[seed % len(_KNOWN)]:
            case "power":
                drop = -depth * torch.expm1(-0.05 / depth * z ** uniform(1.5, 15))
            case "logistic":
                width = uniform(0.03, 0.25)
                rise = torch.sigmoid((z - 1) / width - 2.5)
                drop = depth * (rise - 1 / (1 + math.exp(1 / width + 2.5)))
            case "odds":
                odds = torch.expm1(u) / math.expm1(location)
                steps = 0.05 * odds ** uniform(1.0, 5.0)
                drop = depth * steps / (1 + steps)
            case "staircase":
                edges = torch.tensor([uniform(0.2, 0.9), *(1 + uniform(0, 0.3) for _ in range(4))])
                heights = torch.tensor([uniform(0, 0.004), *(uniform(0.01, 1) for _ in range(4))])
                heights[1:] *= depth / heights[1:].sum()
                drop = (heights * (z[:, None] >= edges)).sum(-1).to(u)
            case _:
                slope, steep = uniform(0, 0.005), uniform(0.2, 3.0)
                drop = (slope * z + steep * (z - 1).clamp(min=0)).clamp(max=depth)
        gain = max(0.0, uniform(-0.003, 0.004))
        drop = drop - gain * (z / 0.5) * torch.exp(1 - z / 0.5)
        error = noise_sd * torch.randn(len(full), generator=generator, dtype=torch.float64)
        tolerance = uniform(0.005, 0.02)
        if share < 1:
            besides = _UNTRAINED * float(torch.rand(1, generator=less))
            drop[len(full) :] += besides * z[len(full) :].clamp(max=1.0)
            other = noise_sd * torch.randn(len(full), generator=less, dtype=torch.float64)
            error = torch.cat([error, other])
            full, utility, measured = (torch.cat([x, x]) for x in (full, utility, measured))
        return cls(
            full, baseline - drop, error, utility, measured, baseline, tolerance, noise_sd, share
        )

    def problem(self, z: float = 0.0, budget: float | None = None) -> Problem:
        """The problem as a strategy is told it.

        Args:
            z: Certification margin.
            budget: The utility that is asked for, instead of the tolerance.
        """
        dense = Observation(torch.zeros(1), self.baseline, self.noise_sd**2, utility=0.0)
        own = slice(self._count)
        problem = Problem(
            candidates=self.candidates[own].unsqueeze(-1),
            utility=self.measured[own],
            baseline=dense,
            level=self.baseline - self.tolerance,
            noise_variance=self.noise_sd**2,
            cliff=True,
            z=z,
            budget=budget,
        )
        return problem.with_share(self.share) if self.share < 1 else problem

    def observe(self, index: int) -> Observation:
        """Evaluate candidate ``index``."""
        point = self.candidates[index : index + 1]
        if self.share < 1:
            share = 1.0 if index < self._count else self.share
            point = torch.cat([point, point.new_tensor([share])])
        return Observation(
            point=point,
            metric=float(self.accuracy[index] + self.noise[index]),
            variance=self.noise_sd**2,
            utility=float(self.measured[index]),
        )

    @property
    def _count(self) -> int:
        """Candidates that stand for all of the training."""
        return len(self.candidates) // (2 if self.share < 1 else 1)

    @property
    def optimum(self) -> float:
        """The greatest true utility of a truly feasible point; 0, the dense model's, if none."""
        feasible = self.accuracy >= self.baseline - self.tolerance
        return float(self.utility.masked_fill(~feasible, 0.0).amax().clamp(min=0.0))

    def best_within(self, budget: float) -> float:
        """The greatest true accuracy of a candidate with at least this known utility."""
        return float(self.accuracy[self.measured >= budget].amax())
