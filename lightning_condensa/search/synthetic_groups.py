"""Synthetic networks of several groups: problems in many dimensions with known answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_condensa.search.domain import Axis, Domain, distinct
from lightning_condensa.search.problem import Observation, Problem

__all__ = ["SyntheticGroups"]

_LEVELS = 64
_DENSEST, _SPARSEST = 1.0, 0.005
_BITS = (16.0, 8.0, 4.0)
_OVERHEAD = 0.002
#: Loss at the place where a group alone is said to have its cliff.
_CLIFF = 0.01


@dataclass(frozen=True)
class SyntheticGroups:
    """One problem: groups of weights with cliffs of their own, and what they do to one another.

    The forms are not those of `DamageCurves`: each group follows one of four families (a power
    law, a logistic, a power of the odds, two straight lines), groups add up in a norm between
    the sum and the worst one, neighbours harm each other further, and few bits hurt more in a
    sparse group. Noise is a function of the point alone, so that all methods see the same.

    Args:
        domain: A density for each group, then, where there are bits, a number of bits for each.
        share: Share of the weights in each group, shape ``[G]``.
        location: ``u`` of each group's cliff, shape ``[G]``.
        steepness: Parameter of each group's family, shape ``[G]``.
        family: Which family, shape ``[G]``.
        fragility: Loss from 8 bits in each group, shape ``[G]``; zeros without bits.
        norm: Exponent with which losses add up, in [0.9, 1.3].
        coupling: Further harm done by neighbours, shape ``[G - 1]``.
        gain: Greatest improvement by mild compression.
        baseline: Accuracy of the dense model.
        depth: Loss when everything is destroyed.
        tolerance: Accuracy that may be lost.
        noise_sd: Standard deviation of one evaluation.
        seed: Seed of the noise.

    Example:
        >>> case = SyntheticGroups.draw(seed=0, groups=4)
        >>> problem = case.problem()
        >>> problem.candidates.shape[1], case.optimum > 0
        (4, True)
    """

    domain: Domain
    share: Tensor
    location: Tensor
    steepness: Tensor
    family: Tensor
    fragility: Tensor
    norm: float
    coupling: Tensor
    gain: float
    baseline: float
    depth: float
    tolerance: float
    noise_sd: float
    seed: int
    _optimum: list[float] = field(default_factory=list, repr=False)

    @classmethod
    def draw(cls, seed: int, groups: int = 8, bits: bool = False) -> SyntheticGroups:
        """Draw a problem.

        Densities from 1 to 0.005; cliffs at ``u`` from 0.4 to 4.5, scattered around a mean;
        group sizes over a factor of about 50; noise 0.1 to 0.4 %, tolerance 0.5 to 2 points.
        With ``bits`` each group has 16, 8 or 4.
        """
        generator = torch.Generator().manual_seed(1_000 + seed)

        def uniform(low: float, high: float, count: int = groups) -> Tensor:
            draws = torch.rand(count, generator=generator, dtype=torch.float64)
            return low + (high - low) * draws

        def one(low: float, high: float) -> float:
            return float(uniform(low, high, 1))

        scatter = torch.randn(groups, generator=generator, dtype=torch.float64)
        share = torch.softmax(1.2 * torch.randn(groups, generator=generator).double(), dim=0)
        location = (one(1.3, 2.8) + one(0.5, 1.0) * scatter).clamp(0.4, 4.5)
        baseline = one(0.7, 0.99)
        u = torch.linspace(0, math.log(_DENSEST / _SPARSEST), _LEVELS, dtype=torch.float64)
        axes = [Axis(u[:, None], origin=0.0)] * groups
        if bits:
            axes += [Axis(torch.eye(len(_BITS)), origin=None)] * groups
        fragility = uniform(math.log(1e-4), math.log(3e-3)).exp() if bits else torch.zeros(groups)
        return cls(
            domain=Domain(tuple(axes), _size(u, share, bits)),
            share=share,
            location=location,
            steepness=uniform(0, 1),
            family=torch.randint(4, (groups,), generator=generator),
            fragility=fragility.double(),
            norm=one(0.9, 1.3),
            coupling=uniform(0.0, 0.8, groups - 1),
            gain=max(0.0, one(-0.002, 0.003)),
            baseline=baseline,
            depth=(baseline - 0.1) * one(0.8, 1.0),
            tolerance=one(0.005, 0.02),
            noise_sd=one(0.001, 0.004),
            seed=seed,
        )

    @property
    def groups(self) -> int:
        """The number of groups."""
        return len(self.share)

    def accuracy(self, level: Tensor) -> Tensor:
        """True accuracy of combinations ``[M, A]``; shape ``[M]``."""
        u = self.domain.axes[0].levels[:, 0][level[:, : self.groups]]
        z = u / self.location
        tenth = 0.02 + 0.2 * self.steepness
        rise = torch.sigmoid((z - 1) / tenth) - torch.sigmoid(-1 / tenth)
        odds = torch.expm1(u) / torch.expm1(self.location)
        shapes = torch.stack(
            [
                z ** (1.5 + 8 * self.steepness),
                rise / (0.5 - torch.sigmoid(-1 / tenth)) + 10 * (z - 1).clamp(min=0),
                odds ** (1 + 2 * self.steepness),
                (0.3 * z + (5 + 40 * self.steepness) * (z - 0.85).clamp(min=0)) / 2,
            ]
        )
        loss = _CLIFF * shapes.gather(0, self.family.expand(1, *u.shape))[0].clamp(max=1e4)
        if len(self.domain.axes) > self.groups:
            coarse = level[:, self.groups :].double()
            bits = self.fragility * (9.0 ** (coarse - 1)) * (coarse > 0)
            loss = loss + bits * (1 + 0.5 * u)
        together = (loss.clamp(min=1e-12) ** self.norm).sum(-1) ** (1 / self.norm)
        neighbours = (self.coupling * (loss[:, 1:] * loss[:, :-1]).sqrt()).sum(-1)
        total = together + 0.5 * neighbours
        mild = u.mean(-1) / self.location.mean() / 0.5
        fall = self.depth * -torch.expm1(-total / self.depth)
        return self.baseline - fall + self.gain * mild * torch.exp(1 - mild)

    def observe(self, point: Tensor) -> Observation:
        """Evaluate a point ``[d]``."""
        level = self.domain.nearest(point[None])
        key = (level * 67 ** torch.arange(level.shape[1])).sum().item()
        generator = torch.Generator().manual_seed((self.seed * 7919 + int(key)) % 2**63)
        noise = self.noise_sd * torch.randn(1, generator=generator, dtype=torch.float64)
        return Observation(
            point=self.domain.points(level)[0],
            metric=float(self.accuracy(level) + noise),
            variance=self.noise_sd**2,
            utility=float(self.domain.utility(level)),
        )

    def problem(
        self, z: float = 0.0, scan: Tensor | None = None, budget: float | None = None
    ) -> Problem:
        """The problem as a strategy is told it; with a budget that utility is asked for."""
        level = distinct(torch.cat([self.domain.diagonals(), self.domain.random(128)]))
        points = self.domain.points(level)
        dense = torch.zeros(points.shape[1], dtype=torch.float64)
        return Problem(
            candidates=points,
            utility=self.domain.utility(level),
            baseline=Observation(dense, self.baseline, self.noise_sd**2, utility=0.0),
            level=self.baseline - self.tolerance,
            noise_variance=self.noise_sd**2,
            cliff=False,
            z=z,
            domain=self.domain,
            accuracy=True,
            scan=scan,
            budget=budget,
        )

    def scan(self, meaningless: bool = False) -> Tensor:
        """What a scan without training would find: early, out of scale and not quite in order.

        Args:
            meaningless: Whether it is drawn without a look at the network.
        """
        generator = torch.Generator().manual_seed(77 + self.seed)
        noise = torch.randn(2, self.groups, generator=generator, dtype=torch.float64)
        location = 0.6 * self.location**0.9 * (0.2 * noise[0]).exp()
        fragile = 4 * self.fragility * (0.5 * noise[1]).exp()
        if meaningless:
            location = 0.3 + 3.0 * torch.rand(self.groups, generator=generator).double()
            fragile = fragile[torch.randperm(self.groups, generator=generator)]
        if len(self.domain.axes) == self.groups:
            return location
        losses = fragile[:, None] * torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64)
        return torch.cat([location, losses.flatten()])

    @property
    def optimum(self) -> float:
        """The greatest utility found of a truly feasible combination, by local search."""
        if not self._optimum:
            self._optimum.append(self._solve())
        return self._optimum[0]

    def single_density(self) -> float:
        """The greatest utility of a truly feasible combination with one strength for all."""
        level = self.domain.diagonals()
        feasible = self.accuracy(level) >= self.baseline - self.tolerance
        return float(self.domain.utility(level).masked_fill(~feasible, 0.0).amax().clamp(min=0))

    def best_within(self, budget: float) -> float:
        """The greatest true accuracy found of a combination with at least this utility.

        Raises:
            ValueError: If no combination with one strength for all has it.
        """
        diagonals = self.domain.diagonals()
        kept = diagonals[self.domain.utility(diagonals) >= budget]
        if not len(kept):
            raise ValueError(f"budget must be within reach of one strength for all, got {budget}")
        level = kept[int(self.accuracy(kept).argmax())]
        while True:
            moves = self._moves(level)
            beyond = self.domain.utility(moves) < budget
            chosen = moves[int(self.accuracy(moves).masked_fill(beyond, -torch.inf).argmax())]
            if torch.equal(chosen, level):
                return float(self.accuracy(level[None]))
            level = chosen

    def _solve(self) -> float:
        """Climb ``utility - price * missing accuracy`` one or two coordinates at a time."""
        required = self.baseline - self.tolerance
        best = 0.0
        for start in (0.2, 0.35, 0.5):
            level = ((self.domain.sizes - 1) * start).long()
            for price in (20.0, 60.0, 200.0, 1e3, 1e4):
                for _ in range(12):
                    moves = self._moves(level)
                    missing = (required - self.accuracy(moves)).clamp(min=-0.005)
                    value = self.domain.utility(moves) - price * missing.clamp(
                        min=0 if price >= 1e3 else -0.005
                    )
                    chosen = moves[int(value.argmax())]
                    if torch.equal(chosen, level):
                        break
                    level = chosen
            moves = self._moves(level)
            feasible = self.accuracy(moves) >= required
            utility = self.domain.utility(moves).masked_fill(~feasible, 0.0)
            best = max(best, float(utility.max()))
        return best

    def _moves(self, level: Tensor) -> Tensor:
        """All changes of one coordinate, and small ones of two; with ``level`` itself."""
        count = len(level)
        found = [level[None]]
        for axis, size in enumerate(self.domain.sizes.tolist()):
            along = level.repeat(size, 1)
            along[:, axis] = torch.arange(size)
            found.append(along)
        steps = torch.tensor([-4, -2, -1, 1, 2, 4])
        first, second = torch.triu_indices(count, count, 1)
        pairs = torch.cartesian_prod(torch.arange(len(first)), steps, steps)
        both = level.repeat(len(pairs), 1)
        rows = torch.arange(len(pairs))
        both[rows, first[pairs[:, 0]]] += pairs[:, 1]
        both[rows, second[pairs[:, 0]]] += pairs[:, 2]
        found.append(both)
        return torch.minimum(torch.cat(found).clamp(min=0), self.domain.sizes - 1)


def _size(u: Tensor, share: Tensor, bits: bool) -> Callable[[Tensor], Tensor]:
    """Minus the logarithm of the size, relative to the dense model of the widest type."""
    width = torch.tensor(_BITS, dtype=torch.float64) / _BITS[0]

    def utility(level: Tensor) -> Tensor:
        groups = len(share)
        size = share * torch.exp(-u[level[:, :groups]])
        if bits:
            size = size * width[level[:, groups:]]
        return -torch.log(_OVERHEAD + (1 - _OVERHEAD) * size.sum(-1))

    return utility
