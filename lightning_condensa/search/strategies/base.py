"""What every search strategy promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_condensa.search.budget import possible
from lightning_condensa.search.problem import Observation, Problem

__all__ = ["Strategy", "occupied"]


class Strategy(ABC):
    """Chooses which candidates to evaluate next; stateless, so that any history can be resumed.

    Subclasses implement `_select`, to which the bookkeeping of `propose` has already been done.
    """

    def propose(
        self,
        problem: Problem,
        history: Sequence[Observation],
        pending: Tensor | None,
        q: int,
        seed: int,
    ) -> list[int]:
        """Propose candidates.

        Args:
            problem: What is sought, and the candidates.
            history: Finished evaluations in order; the baseline is not among them.
            pending: Points under evaluation, shape ``[k, d]``, or None.
            q: How many to propose.
            seed: Makes the proposal reproducible; use a new one for each call.

        Returns:
            ``q`` distinct indices into ``problem.candidates``, most wanted first, none of them
            finished, pending, or beyond the problem's budget; fewer when fewer remain, none when
            none does.

        Raises:
            ValueError: If ``q < 1``, a shape does not fit the problem, or the strategy cannot
                handle such a problem.
        """
        pending, free = self._checked(problem, history, pending, q)
        q = min(q, int(free.sum()))
        return self._select(problem, history, pending, free, q, seed) if q else []

    def suggest(
        self,
        problem: Problem,
        history: Sequence[Observation],
        pending: Tensor | None,
        q: int,
        seed: int,
    ) -> Tensor:
        """Points to evaluate: those of `propose`, or others of the problem's domain.

        Args:
            problem: What is sought.
            history: As for `propose`.
            pending: As for `propose`.
            q: As for `propose`.
            seed: As for `propose`.

        Returns:
            Distinct points, most wanted first, shape ``[<= q, d]``.

        Raises:
            ValueError: As for `propose`.
        """
        return problem.candidates[self.propose(problem, history, pending, q, seed)]

    @staticmethod
    def _checked(
        problem: Problem, history: Sequence[Observation], pending: Tensor | None, q: int
    ) -> tuple[Tensor, Tensor]:
        """Pending points in double precision, and which candidates are free."""
        d = problem.candidates.shape[-1]
        if q < 1:
            raise ValueError(f"q must be at least 1, got {q}")
        if pending is None:
            pending = problem.candidates.new_empty(0, d)
        if pending.ndim != 2 or pending.shape[-1] != d:
            raise ValueError(f"pending must have shape [k, {d}], got {list(pending.shape)}")
        if any(len(seen.point) != d for seen in history):
            raise ValueError(f"history must hold points of {d} coordinates")
        pending = pending.to(problem.candidates)
        taken = torch.cat([pending, *(seen.point[None] for seen in history)])
        return pending, ~occupied(problem.candidates, taken) & possible(problem, history)

    @abstractmethod
    def _select(
        self,
        problem: Problem,
        history: Sequence[Observation],
        pending: Tensor,
        free: Tensor,
        q: int,
        seed: int,
    ) -> list[int]:
        """Choose ``q`` of the candidates marked in ``free`` [N]; there are at least ``q``."""


def occupied(candidates: Tensor, points: Tensor) -> Tensor:
    """Which candidates [N, d] are among ``points`` [k, d], up to rounding; shape ``[N]``.

    Example:
        >>> occupied(torch.tensor([[0.1], [0.2]]).double(), torch.tensor([[0.2]]).double())
        tensor([False,  True])
    """
    if len(points) == 0:
        return torch.zeros(len(candidates), dtype=torch.bool)
    tolerance = 1e-9 * (1 + candidates.abs().amax())
    gap = (candidates.unsqueeze(1) - points.unsqueeze(0)).abs().amax(dim=-1)
    return (gap <= tolerance).any(dim=-1)


def require_level(problem: Problem, name: str) -> None:
    """Refuse problems in which no level of the metric has to be kept.

    Raises:
        ValueError: If there is a budget.
    """
    if problem.budget is not None:
        raise ValueError(
            f"strategy {name!r} looks for a level of the metric, and none is to be kept within a "
            "budget; use 'condensa', 'random' or 'grid'"
        )


def require_one_coordinate(problem: Problem, name: str) -> Tensor:
    """The candidates' only coordinate, shape ``[N]``.

    Raises:
        ValueError: If there are several coordinates.
    """
    d = problem.candidates.shape[-1]
    if d != 1:
        raise ValueError(f"strategy {name!r} needs one coordinate, got {d}; use 'condensa'")
    return problem.candidates[:, 0]
