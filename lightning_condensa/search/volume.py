"""Expected hypervolume improvement where the objectives are known and feasibility is learned."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_condensa.search.feasibility import FeasibilityModel, feasible_ones
from lightning_condensa.search.pareto import gains, hypervolume
from lightning_condensa.search.problem import Observation, Problem

__all__ = ["VolumeImprovement"]

#: Draws of which pending trials turn out feasible.
_DRAWS = 32


class VolumeImprovement:
    r"""Values candidates by the hypervolume that they are expected to add.

    .. math::
        \alpha(x) = \log P(x \text{ feasible})
            + \log E[HV(F \cup \{x\})^{1/m} - HV(F)^{1/m}]

    exact, as only feasibility is random; ``F`` are the feasible trials, and the expectation is
    over which of the pending ones will be feasible, too. Volumes begin at the dense model, on the
    scale of the utilities: logarithms of ``m`` positive objectives. A volume grows with the m-th
    power of what is gained, so that its expectation would go for long shots; its root does not.

    Args:
        problem: With several utilities.
        model: The surrogate.
        history: Finished evaluations.
        seed: Of draws.
    """

    def __init__(
        self, problem: Problem, model: FeasibilityModel, history: Sequence[Observation], seed: int
    ) -> None:
        """Judge the history."""
        self._model, self._seed, self._history = model, seed, history
        self.good = feasible_ones(problem, history, model)
        weights = torch.rand(
            problem.utilities.shape[-1],
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        self.weights = weights / weights.sum()

    def merits(self, problem: Problem) -> list[float]:
        """A sum of each one's utilities; of infeasible ones −inf.

        The weights follow from the seed: not always the same part of the front is looked around in.
        """
        return [
            float(problem.utilities_of(seen) @ self.weights) if feasible else -math.inf
            for seen, feasible in zip(self._history, self.good, strict=True)
        ]

    def __call__(self, problem: Problem, pending: Tensor) -> Tensor:
        """The log-value of each candidate by itself.

        Args:
            problem: With the candidates.
            pending: Points under evaluation, shape ``[k, d]``.

        Returns:
            Shape ``[N]``.
        """
        reference = problem.utilities_of(problem.baseline)
        kept = [
            problem.utilities_of(seen)
            for seen, feasible in zip(self._history, self.good, strict=True)
            if feasible
        ]
        front = torch.stack(kept) if kept else reference.new_empty(0, len(reference))
        chance = self._chance(problem.candidates)
        gain = self._gain(problem, front, reference)
        if len(pending):
            generator = torch.Generator().manual_seed(self._seed)
            shape = (_DRAWS, len(pending))
            draws = torch.rand(shape, generator=generator, dtype=torch.float64)
            rivals = problem.utilities_at(pending)
            outcomes = Counter(map(tuple, (draws < self._chance(pending)).tolist()))
            gain = torch.zeros_like(gain)
            for outcome, count in outcomes.items():
                more = torch.cat([front, rivals[list(outcome)]])
                gain += self._gain(problem, more, reference) * count / _DRAWS
        # What adds nothing has an order, too: by how likely it is to be feasible.
        floor = 1e-9 * (1 + float(gain.max()))
        return chance.clamp(min=1e-300).log() + gain.clamp(min=floor).log()

    @staticmethod
    def _gain(problem: Problem, front: Tensor, reference: Tensor) -> Tensor:
        before = hypervolume(front, reference)
        root = 1 / len(reference)
        after: Tensor = (before + gains(problem.utilities, front, reference)) ** root
        return after - math.pow(before, root)

    def _chance(self, points: Tensor) -> Tensor:
        chance: Tensor = self._model.feasibility(points.unsqueeze(-2)).probability.squeeze(-1)
        return chance
