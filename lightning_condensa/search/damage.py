"""Additive damage: what each dimension of a compression costs, added up before accuracy falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_condensa.search.domain import Axis

__all__ = ["DamageCurves", "DamagePrior"]

_UNIT = 0.01
#: Loss expected of the first step of a choice, in tolerances, and of each further one in the
#: one before: eight bits cost little, four cost more.
_FIRST_RISE, _GROWTH = 0.03, 5.0
_LARGEST = 60.0  # of an exponent: beyond it everything is destroyed anyway


@dataclass(frozen=True)
class DamagePrior:
    """A Gaussian over the parameters of `DamageCurves`.

    Args:
        mean: Shape ``[P]``.
        scale: A square root of the covariance, lower triangular, shape ``[P, P]``.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, axes: Sequence[Axis], tolerance: float, scan: Tensor | None = None) -> DamagePrior:
        """What is believed of the axes before any evaluation.

        Locations of ranges share most of their uncertainty, so that one density for all tells of
        every group. With a scan they differ as it says, up to a common shift: a network recovers
        in training, and all groups do so alike.

        Args:
            axes: The axes.
            tolerance: Loss that matters; options of a choice are expected to cost a part of it.
            scan: For each coordinate of a range where the untrained network loses the first
                points, for each option of a choice what it loses; NaN where unknown. Shape ``[d]``.
        """
        ranges = [axis for axis in axes if axis.is_range]
        reach = torch.tensor(
            [float(axis.levels[-1, 0]) - (axis.origin or 0.0) for axis in ranges],
            dtype=torch.float64,
        )
        centre = (0.5 * reach).clamp(max=2.0)
        shared, own = 0.6 * centre, 0.4 * centre
        stretch = torch.zeros_like(centre)
        if scan is not None and ranges:
            found = _range_columns(axes, scan)
            known = found.isfinite()
            relative = (found - found.nanmean()).nan_to_num()
            shift = (found.nanmean() + 0.25 * centre).nan_to_num()
            own = torch.where(known, 0.4 * own, own)
            stretch = 0.5 * relative  # standard deviation of what a unit of the scan is worth
            centre = torch.where(known, shift + 1.2 * relative, centre)
        parts = [(centre, shared, own)]
        width = (0.25 * (0.5 * reach).clamp(max=2.0)).clamp(min=1e-3).log()
        parts.append((width, torch.full_like(width, 0.4), torch.full_like(width, 0.3)))
        rises, spreads = [], []
        for axis, column in _choices(axes, scan):
            k = torch.arange(len(axis) - 1, dtype=torch.float64)
            rise = math.log(_FIRST_RISE * max(tolerance, 1e-3)) + k * math.log(_GROWTH)
            spread = torch.full_like(k, 1.0)
            if column is not None:
                step = column.diff().clamp(min=1e-5)
                rise = torch.where(step.isfinite(), (0.3 * step).log(), rise)
                spread = torch.where(step.isfinite(), 0.7, 1.0).to(rise)
            rises.append(rise)
            spreads.append(spread)
        if rises:
            rise = torch.cat(rises)
            parts.append((rise, torch.full_like(rise, 0.8), torch.cat(spreads)))
        gain = torch.zeros(1, dtype=torch.float64)
        parts.append((gain, gain, torch.full_like(gain, 0.002)))
        mean = torch.cat([part[0] for part in parts])
        covariance: Tensor = torch.block_diag(  # type: ignore[no-untyped-call]
            *[torch.outer(both, both) + torch.diag(alone**2) for _, both, alone in parts]
        )
        covariance[: len(stretch), : len(stretch)] += torch.outer(stretch, stretch)
        jitter = 1e-9 * torch.eye(len(mean), dtype=torch.float64)
        return cls(mean, torch.linalg.cholesky(covariance + jitter))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Parameters from the prior, shape ``[count, P]``."""
        normal = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        return self.mean + normal @ self.scale.T


def _range_columns(axes: Sequence[Axis], values: Tensor) -> Tensor:
    starts = torch.tensor([0, *(axis.width for axis in axes)]).cumsum(0)[:-1]
    own = [
        values[start] - (axis.origin or 0.0)
        for start, axis in zip(starts, axes, strict=True)
        if axis.is_range
    ]
    return torch.stack(own).to(torch.float64)


def _choices(axes: Sequence[Axis], scan: Tensor | None) -> list[tuple[Axis, Tensor | None]]:
    """Each choice with what the scan says of its options, mildest first."""
    found = []
    start = 0
    for axis in axes:
        if not axis.is_range:
            column = None if scan is None else axis.levels @ scan[start : start + axis.width]
            found.append((axis, column))
        start += axis.width
    return found


class DamageCurves:
    """``S`` models of the metric as a function of a point.

    With ``t`` the distance of a range from its origin, damages add up::

        H = sum over ranges 0.01 (exp((t - c) / w) - exp(-c / w))
            + sum over choices of the rises up to the option
        loss = depth (1 - (1 + H / 2)^-2) - gain

    so that ``c`` is where a group alone costs about a point, and the loss saturates without its
    gradient vanishing. An option's damage is a sum of positive rises over the milder ones.

    Args:
        axes: The axes.
        parameters: ``c`` of all ranges, ``log w`` of all ranges, logarithms of the rises of all
            choices, ``gain``; shape ``[S, P]``.
        depth: Loss when everything is destroyed, shape ``[S]``.
    """

    def __init__(self, axes: Sequence[Axis], parameters: Tensor, depth: Tensor) -> None:
        """Hold the parameters."""
        self.axes = tuple(axes)
        self.parameters = parameters
        self.depth = depth
        self.ranges = sum(axis.is_range for axis in axes)

    def damage(self, points: Tensor) -> Tensor:
        """``H`` of each model at ``points`` [..., n, d]; shape ``[..., S, n]``."""
        distance, passed = features(self.axes, points)
        r = self.ranges
        location, width = self.parameters[:, :r], self.parameters[:, r : 2 * r].exp()
        rises = self.parameters[:, 2 * r : -1].exp()
        total = rises @ passed.mT
        for i in range(r):  # a range at a time: S x n, not S x n x ranges
            at = (distance[..., i].unsqueeze(-2) - location[:, i, None]) / width[:, i, None]
            rest = (-location[:, i] / width[:, i]).clamp(max=_LARGEST).exp()[:, None]
            total = total + _UNIT * (at.clamp(max=_LARGEST).exp() - rest)
        return total

    def drop(self, points: Tensor) -> Tensor:
        """The loss of each model at ``points`` [..., n, d]; shape ``[..., S, n]``."""
        damage = self.damage(points).clamp(min=0)
        gain = self.parameters[:, -1:]
        return self.depth[:, None] * (1 - (1 + damage / 2) ** -2) - gain

    def jacobian(self, distance: Tensor, passed: Tensor) -> tuple[Tensor, Tensor]:
        """The loss at ``n`` points, and its derivatives by the parameters.

        Args:
            distance: Of the points, as `features` gives it, shape ``[n, ranges]``.
            passed: Of the points, shape ``[n, options]``.

        Returns:
            Shapes ``[S, n]`` and ``[S, n, P]``.
        """
        r = self.ranges
        location = self.parameters[:, None, :r]
        width = self.parameters[:, None, r : 2 * r].exp()
        rises = self.parameters[:, None, 2 * r : -1].exp()
        at, start = (distance - location) / width, -location / width
        grown = _UNIT * at.clamp(max=_LARGEST).exp()
        rest = _UNIT * start.clamp(max=_LARGEST).exp()
        by_location = -(grown - rest) / width
        by_width = -(grown * at - rest * start)
        by_rise = rises * passed
        damage = ((grown - rest).sum(-1) + by_rise.sum(-1)).clamp(min=0)
        depth = self.depth[:, None]
        slope = depth * (1 + damage / 2) ** -3
        by_damage = torch.cat([by_location, by_width, by_rise], dim=-1)
        by_gain = -torch.ones_like(damage)
        derivatives = torch.cat([slope[..., None] * by_damage, by_gain[..., None]], dim=-1)
        loss = depth * (1 - (1 + damage / 2) ** -2) + self.parameters[:, -1:] * by_gain
        return loss, derivatives


def features(axes: Sequence[Axis], points: Tensor) -> tuple[Tensor, Tensor]:
    """Distances along the ranges, and which rises of the choices have been passed.

    Args:
        axes: The axes.
        points: Shape ``[..., d]``.

    Returns:
        Shapes ``[..., ranges]`` and ``[..., options]``, an option per choice less.
    """
    distances, passed = [points[..., :0]], [points[..., :0]]
    start = 0
    for axis in axes:
        own = points[..., start : start + axis.width]
        if axis.origin is not None:
            distances.append((own - axis.origin).clamp(min=0))
        else:  # levels may stand in any order of columns
            by_level = own @ axis.levels.T
            passed.append(by_level.flip(-1).cumsum(-1).flip(-1)[..., 1:])
        start += axis.width
    return torch.cat(distances, dim=-1), torch.cat(passed, dim=-1)
