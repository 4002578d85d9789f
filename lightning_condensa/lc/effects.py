"""What the loss would feel of a group's removal: first-order Taylor terms, squared and summed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lightning_condensa.schemes import BoundScheme


class Effects:
    """``Σ_t (Σ_i w_i·∂L_t/∂w_i)²`` of every group that a scheme judges so, over some steps t.

    The inner sum runs over the elements of a group: to first order it is the change of the loss of
    step t if the group were zero (Molchanov et al., "Importance Estimation for Neural Network
    Pruning", CVPR 2019, eq. 8). One number per group is kept; they are dropped after each C-step.
    """

    def __init__(self) -> None:
        self._squares: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def observe(
        self, bound: BoundScheme, parameters: Mapping[str, Tensor], only: Collection[int] | None
    ) -> None:
        """Add what the gradients that are there say.

        Args:
            bound: The scheme; its stages know their groups.
            parameters: The compressed parameters by name.
            only: ``id`` of the parameters to look at; all of them where ``None``.
        """
        gradients = {
            name: parameter.grad
            for name, parameter in parameters.items()
            if parameter.grad is not None and (only is None or id(parameter) in only)
        }
        self._squares = self._squares or [{} for _ in bound.stages]
        for (stage, targets), squares in zip(bound.stages, self._squares, strict=True):
            for name, effect in stage.effects(targets, parameters, gradients).items():
                square = effect.to(torch.float32).square()
                squares[name] = squares[name] + square if name in squares else square

    def take(self) -> list[dict[str, Tensor]]:
        """The root of the sums, for each stage by target; forgets them.

        Empty where no gradient was seen or one overflowed in mixed precision.
        """
        squares, self._squares = self._squares, []
        if not all(math.isfinite(float(s.sum())) for stage in squares for s in stage.values()):
            return []
        return [{name: s.sqrt() for name, s in stage.items()} for stage in squares]

    def state_dict(self) -> list[dict[str, Tensor]]:
        """The sums so far."""
        return [dict(stage) for stage in self._squares]

    def load_state_dict(
        self, state: list[dict[str, Tensor]], parameters: Mapping[str, Tensor]
    ) -> None:
        """Take up what :meth:`state_dict` gave, on the parameters' devices."""
        self._squares = [
            {name: s.to(parameters[name].device) for name, s in stage.items()} for stage in state
        ]
