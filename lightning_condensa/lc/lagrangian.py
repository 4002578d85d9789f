"""The augmented Lagrangian of L-C: θ, the multipliers λ and the penalty μ.

    min L(w)  subject to  w = Δ(θ)

    L-step   w ← argmin L(w) + μ/2 ‖w − Δ(θ) − λ/μ‖²     (some steps of the user's optimizer)
    C-step   θ ← Π(w − λ/μ)
             λ ← λ − μ (w − Δ(θ)),   μ grows

Carreira-Perpiñán, "Model compression as constrained optimization, with application to neural
nets. Part I" (arXiv:1707.01209), eq. 4; Joseph et al., arXiv:1911.02497, §4.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_condensa.functional.norms import norm
from lightning_condensa.functional.placement import local, placed
from lightning_condensa.lc.states import encoded_from_state, encoded_state
from lightning_condensa.schemes import BoundScheme, Encoding


class Lagrangian:
    """The dual side of L-C for one network.

    One dense buffer per compressed parameter is kept beside θ, the *anchor* ``μΔ(θ) + λ``: all
    that the gradient of the penalty needs, ``μ(w − Δ(θ)) − λ = μw − anchor``.

    Args:
        theta: The first θ.
        mu: μ of the first L-step; λ begins at zero.

    Attributes:
        theta: Current θ by parameter name.
        mu: Penalty weight μ of the current L-step.
    """

    def __init__(self, theta: Mapping[str, Encoding], mu: float = 0.0) -> None:
        self.theta: dict[str, Encoding] = dict(theta)
        self.mu = mu
        self._anchor = {name: mu * e.decode() for name, e in self.theta.items()}

    @torch.no_grad()
    def multipliers(self) -> dict[str, Tensor]:
        """λ, one tensor per compressed parameter."""
        return {n: a - self.mu * self.theta[n].decode() for n, a in self._anchor.items()}

    @torch.no_grad()
    def add_penalty_gradient(
        self, parameters: Mapping[str, Tensor], only: Collection[int] | None = None
    ) -> None:
        """Add ``μ(w − Δ(θ)) − λ`` to the gradients, in place.

        Parameters without a gradient (frozen, or unused in this step) are left alone.

        Args:
            parameters: The compressed parameters by name.
            only: ``id`` of the parameters to touch; all of them where ``None``.
        """
        if self.mu == 0:
            return
        grads, weights, anchors = [], [], []
        for name, anchor in self._anchor.items():
            parameter = parameters[name]
            if parameter.grad is not None and (only is None or id(parameter) in only):
                grads.append(local(parameter.grad))
                weights.append(local(parameter.detach()))
                anchors.append(local(anchor))
        if grads:
            torch._foreach_add_(grads, weights, alpha=self.mu)
            torch._foreach_sub_(grads, anchors)

    @torch.no_grad()
    def gradient_ratio(self, parameters: Mapping[str, Tensor]) -> float | None:
        """‖penalty gradient‖ / ‖loss gradient‖, before the penalty is added; ``None`` without."""
        grads = {n: g for n in self._anchor if (g := parameters[n].grad) is not None}
        if not grads or self.mu == 0:
            return None
        penalty = {n: self.mu * parameters[n].detach() - self._anchor[n] for n in grads}
        return norm(penalty.values()) / norm(grads.values())

    @torch.no_grad()
    def shifted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``w − λ/μ``: what the C-step projects."""
        if self.mu == 0:
            return {name: weights[name].detach() for name in self.theta}
        return {
            name: weights[name].detach() + self.theta[name].decode() - anchor / self.mu
            for name, anchor in self._anchor.items()
        }

    @torch.no_grad()
    def c_step(
        self,
        weights: Mapping[str, Tensor],
        bound: BoundScheme,
        next_mu: float,
        untrained: Collection[str] = (),
    ) -> None:
        """θ ← Π(w − λ/μ); λ ← λ − μ(w − Δ(θ)); μ ← ``next_mu``.

        Args:
            weights: The network's parameters.
            bound: The scheme to project onto.
            next_mu: Penalty weight of the coming L-step.
            untrained: Parameters that the L-step cannot move. Their λ stays zero: it would only
                wind up, and pull their θ away from w.
        """
        shifted = self.shifted(weights)
        theta = bound.pi(shifted)
        for name, encoded in theta.items():
            decoded = encoded.decode()
            anchor = next_mu * decoded
            if self.mu > 0 and name not in untrained:
                # λ = μ(w − shifted), so λ − μ(w − Δ(θ)) is μ(Δ(θ) − shifted).
                anchor += self.mu * (decoded - shifted[name])
            self._anchor[name] = anchor
        self.theta = theta
        self.mu = next_mu

    def state_dict(self) -> dict[str, Any]:
        """μ, and the tensors of θ and the anchors."""
        return {
            "mu": self.mu,
            "anchor": dict(self._anchor),
            "theta": {n: encoded_state(e) for n, e in self.theta.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Lagrangian:
        """What :meth:`state_dict` described, placed like the parameters."""
        theta = {
            n: encoded_from_state(s, parameters[n].device).whole().placed(parameters[n])
            for n, s in state["theta"].items()
        }
        lagrangian = cls(theta, float(state["mu"]))
        for name, anchor in state["anchor"].items():
            parameter = parameters[name]
            lagrangian._anchor[name] = placed(anchor.to(parameter.device), parameter).clone()
        return lagrangian
