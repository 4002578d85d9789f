"""How far an optimizer moves the weights per unit of gradient, measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class OptimizerResponse:
    """Measures ``r = ‖Δw‖ / (lr · ‖g‖)`` on one optimizer step without a penalty.

    r is about 1 for plain SGD and ``1 / rms(g)`` for Adam on its first steps, so that a penalty
    gradient ``μ(w − Δ(θ))`` closes the share ``rate = μ · lr · r`` of the gap per step whatever
    the optimizer. The largest learning rate so far stands for ``lr``: a warm-up's tiny first value
    would blow μ up.
    """

    def __init__(self) -> None:
        self.response: float | None = None
        self._peak_lr = 0.0
        self._lr = 0.0
        self._gradient_norm: float | None = None
        self._before: dict[str, Tensor] = {}

    @property
    def mu_of_unit_rate(self) -> float:
        """μ at which one step closes the whole gap; 0 until measured."""
        if self.response is None or self._peak_lr == 0:
            return 0.0
        return 1.0 / (self._peak_lr * self.response)

    def before_step(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Note the learning rate and, until measured, the weights and gradients."""
        compressed = {id(p) for p in parameters.values()}
        own: set[int] = set()
        lrs = []
        for group in optimizer.param_groups:
            if members := compressed & {id(p) for p in group["params"]}:
                own |= members
                lrs.append(float(group["lr"]))
        if not lrs:
            return
        self._lr = max(lrs)
        self._peak_lr = max(self._peak_lr, self._lr)
        if self.response is None:
            moving = {n: p for n, p in parameters.items() if id(p) in own and p.grad is not None}
            self._before = {n: p.detach().clone() for n, p in moving.items()}
            grads = [p.grad for p in moving.values() if p.grad is not None]
            self._gradient_norm = float(_norm(grads)) if grads else None

    def after_step(self, parameters: Mapping[str, Tensor]) -> bool:
        """Compare with the weights now.

        Returns:
            Whether the response was measured by this step. A step that a gradient scaler skipped
            measures nothing; the next one is tried.
        """
        if self.response is not None or self._gradient_norm is None:
            return False
        moved = float(_norm([parameters[n].detach() - w for n, w in self._before.items()]))
        norm, self._gradient_norm, self._before = self._gradient_norm, None, {}
        if not (math.isfinite(moved) and math.isfinite(norm) and moved > 0 and norm * self._lr > 0):
            return False
        self.response = moved / (self._lr * norm)
        return True

    def state_dict(self) -> dict[str, Any]:
        """The measured response and the largest learning rate."""
        return {"response": self.response, "peak_lr": self._peak_lr}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> OptimizerResponse:
        """The response that :meth:`state_dict` described."""
        response = cls()
        response.response = state["response"]
        response._peak_lr = state["peak_lr"]
        return response


def _norm(tensors: list[Tensor]) -> Tensor:
    norm: Tensor = torch.stack([t.norm() for t in tensors]).norm()
    return norm
