"""Parametric curves of a model's accuracy as it is compressed: flat, then a cliff."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["RUN_SD", "CliffCurves", "CliffShift", "thin"]

RUN_SD = (0.0007, 0.0015, 0.003, 0.005)
#: Mean and standard deviation of how much farther, in logarithms of ``u``, training moves a cliff.
_MOVED, _MOVED_SD = math.log(3.0), 0.6

#: Range of the exponent of a share: at 0.1 the first epochs do nearly all, at 1 each does as much.
_RATES = (0.1, 1.0)


@dataclass(frozen=True)
class CliffCurves:
    """``S`` curves of the accuracy lost at ``u = -ln(density)``; every field has shape ``[S]``.

    With ``x = u / (gain_at * location)``, the loss at ``u`` is::

        depth * (1 - exp(-0.05 / depth * (u / location)^power))
            + slope * min(u / location, 1.5) - gain * x * exp(1 - x)

    so that ``location`` is where about five points are lost, ``power`` how steep the cliff is,
    ``depth`` how deep it goes, ``slope`` a slow decline before it and ``gain`` the improvement
    that mild compression often brings.

    Args:
        location: The cliff's position in ``u``.
        power: Its steepness, >= 1.
        depth: The loss at its foot.
        slope: The loss accumulated slowly up to the cliff.
        gain: The greatest improvement before it.
        gain_at: Where that improvement peaks, as a share of ``location``.
        run_sd: Standard deviation from one training run to the next.
    """

    location: Tensor
    power: Tensor
    depth: Tensor
    slope: Tensor
    gain: Tensor
    gain_at: Tensor
    run_sd: Tensor

    def __len__(self) -> int:
        """The number of curves."""
        return len(self.location)

    def __getitem__(self, index: Tensor) -> CliffCurves:
        """The curves at ``index``."""
        return CliffCurves(*(getattr(self, field.name)[index] for field in fields(self)))

    @classmethod
    def prior(
        cls, count: int, u_max: float, generator: torch.Generator, one_shot: float | None = None
    ) -> CliffCurves:
        """Draw curves from the prior.

        The location is uniform in ``u`` for six curves in ten and uniform in sparsity for the
        others, so that both early and late cliffs are covered; the power is log-uniform on
        [1.5, 60], the depth uniform on [0.3, 0.97]; half of the curves have no slope and three
        in ten no gain.

        Args:
            count: Number of curves ``S``.
            u_max: The greatest ``u`` that can be proposed; cliffs a little beyond it are drawn
                too, as a network may survive everything.
            generator: Source of the draws.
            one_shot: Where the network loses the first points without any training; training moves
                the cliff to sparser points, mostly two to six times as far in ``u``. Half of the
                curves believe that, so that their share after some observations is by how well
                they predicted them, and one that misleads does little harm. None where unknown.

        Example:
            >>> curves = CliffCurves.prior(1000, 5.0, torch.Generator().manual_seed(0))
            >>> curves.drop(torch.zeros(1, dtype=torch.float64)).abs().max().item()
            0.0
        """

        def uniform(low: float, high: float) -> Tensor:
            draws = torch.rand(count, generator=generator, dtype=torch.float64)
            return low + (high - low) * draws

        def unless(share: float, value: Tensor) -> Tensor:
            return torch.where(uniform(0, 1) < share, torch.zeros_like(value), value)

        low = min(0.02, u_max / 10)
        in_u = uniform(low, 1.05 * u_max)
        in_sparsity = -torch.log1p(-uniform(low, -math.expm1(-1.02 * u_max)))
        level = torch.randint(len(RUN_SD), (count,), generator=generator)
        normal = torch.randn(count, generator=generator, dtype=torch.float64)
        location = torch.where(uniform(0, 1) < 0.6, in_u, in_sparsity)
        if one_shot is not None and math.isfinite(one_shot):
            moved = torch.randn(count, generator=generator, dtype=torch.float64) * _MOVED_SD
            told = max(one_shot, low) * (_MOVED + moved).exp()
            believes = uniform(0, 1) < 0.5
            location = torch.where(believes, told.clamp(low, 1.05 * u_max), location)
        return cls(
            location=location,
            power=uniform(math.log(1.5), math.log(60)).exp(),
            depth=uniform(0.3, 0.97),
            slope=unless(0.5, uniform(0, 0.006)),
            gain=unless(0.3, 0.004 * normal.abs()),
            gain_at=uniform(0.2, 0.8),
            run_sd=torch.tensor(RUN_SD, dtype=torch.float64)[level],
        )

    def drop(self, u: Tensor, stretch: Tensor | float = 1.0) -> Tensor:
        """Accuracy lost by each curve.

        Args:
            u: Shape ``[..., n]``.
            stretch: By what each curve multiplies it, shape ``[..., S, n]``.

        Returns:
            Shape ``[..., S, n]``.
        """
        location, power, depth, slope, gain, gain_at = (
            value.unsqueeze(-1)
            for value in (
                self.location, self.power, self.depth, self.slope, self.gain, self.gain_at
            )
        )  # fmt: skip
        z = u.unsqueeze(-2) * stretch / location
        x = z / gain_at
        fall = -depth * torch.expm1(-(0.05 / depth) * (z**power).clamp(max=1e6))
        return fall + slope * z.clamp(max=1.5) - gain * x * torch.exp(1 - x)


@dataclass(frozen=True)
class CliffShift:
    """Where a share of the training leaves each of ``S`` cliffs; every field has shape ``[S]``.

    Training moves the cliff of the untrained network to sparser points, from ``u_0`` to
    ``u_0 e^moved``. A share ``s`` of it goes the part ``s^rate`` of that way, on the logarithmic
    scale, so that the loss at ``u`` after a share is that of all training at a sparser point::

        drop_s(u) = drop(u * exp(moved * (1 - s^rate)))

    Args:
        moved: How far all of it moves the cliff, >= 0.
        rate: How soon, in (0, 1].
    """

    moved: Tensor
    rate: Tensor

    def __getitem__(self, index: Tensor) -> CliffShift:
        """The shifts at ``index``."""
        return CliffShift(self.moved[index], self.rate[index])

    @classmethod
    def prior(cls, count: int, generator: torch.Generator) -> CliffShift:
        """Draw shifts: mostly two to six times as far in ``u`` for all training, at any rate.

        Args:
            count: Number of shifts ``S``.
            generator: Source of the draws.
        """
        normal = torch.randn(count, generator=generator, dtype=torch.float64)
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        low, high = (math.log(rate) for rate in _RATES)
        return cls(
            moved=(_MOVED + _MOVED_SD * normal).clamp(min=0.0),
            rate=(low + (high - low) * uniform).exp(),
        )

    def stretch(self, share: Tensor) -> Tensor:
        """By what ``u`` is multiplied to find the loss after a share of the training.

        Args:
            share: In (0, 1], shape ``[..., n]``.

        Returns:
            At least 1, shape ``[..., S, n]``.

        Example:
            >>> shift = CliffShift(torch.tensor([1.0]), torch.tensor([0.5]))
            >>> shift.stretch(torch.tensor([0.25, 1.0]))
            tensor([[1.6487, 1.0000]])
        """
        left = 1 - share.unsqueeze(-2) ** self.rate.unsqueeze(-1)
        return (self.moved.unsqueeze(-1) * left).exp()


def thin(log_weights: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keep at most ``count`` weighted members without bias and without duplicates.

    Members heavier than a threshold ``c`` keep their weight; the others survive with probability
    ``weight / c`` and then weigh ``c``, where ``c`` makes the expected number ``count``. This is
    the resampling of least variance (Fearnhead and Clifford, 2003).

    Args:
        log_weights: Normalised or not, shape ``[S]``.
        count: How many to keep.
        generator: Source of the one uniform number used.

    Returns:
        Indices and normalised log-weights, at most ``count`` (+ 1 by rounding) of each.

    Example:
        >>> index, log_w = thin(torch.zeros(100), 10, torch.Generator().manual_seed(0))
        >>> len(index), round(log_w.exp().sum().item(), 6)
        (10, 1.0)
    """
    weights = torch.softmax(log_weights, dim=0)
    if len(weights) <= count:
        return torch.arange(len(weights)), weights.log()
    ordered = weights.sort(descending=True).values
    light = ordered.flip(0).cumsum(0).flip(0)  # light[k]: the weight beyond the k heaviest
    # Keeping the k heaviest leaves count - k places for the rest, hence c = light[k] / (count - k);
    # the right k is the first whose next heaviest member would not exceed c.
    threshold = light[:count] / torch.arange(count, 0, -1)
    k = int((ordered[:count] <= threshold).int().argmax())
    cut = threshold[k]
    heavy = weights > cut
    rank = torch.where(heavy, 0, weights).cumsum(0) / cut
    offset = torch.rand(1, generator=generator, dtype=weights.dtype)
    crossed = (rank + offset).floor().diff(prepend=offset.floor()) > 0
    kept = torch.nonzero(heavy | crossed).squeeze(-1)
    new = torch.where(heavy, weights, cut)[kept]
    return kept, (new / new.sum()).log()
