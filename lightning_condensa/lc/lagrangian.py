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

from lightning_condensa.schemes import BoundScheme, Encoded


class Lagrangian:
    """The dual side of L-C for one network.

    One dense buffer per compressed parameter is kept beside θ, the *anchor* ``μΔ(θ) + λ``: all
    that the gradient of the penalty needs, ``μ(w − Δ(θ)) − λ = μw − anchor``.

    Args:
        theta: The first θ.

    Attributes:
        theta: Current θ by parameter name.
        mu: Penalty weight μ of the current L-step; 0 until the first penalized one.
    """

    def __init__(self, theta: Mapping[str, Encoded]) -> None:
        self.theta: dict[str, Encoded] = dict(theta)
        self.mu = 0.0
        self._anchor = {name: torch.zeros_like(e.decode()) for name, e in self.theta.items()}

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
                grads.append(parameter.grad)
                weights.append(parameter.detach())
                anchors.append(anchor)
        if grads:
            torch._foreach_add_(grads, weights, alpha=self.mu)
            torch._foreach_sub_(grads, anchors)

    @torch.no_grad()
    def gradient_ratio(self, parameters: Mapping[str, Tensor]) -> float | None:
        """‖penalty gradient‖ / ‖loss gradient‖, before the penalty is added; ``None`` without."""
        grads = {n: g for n in self._anchor if (g := parameters[n].grad) is not None}
        if not grads or self.mu == 0:
            return None
        penalty = [self.mu * parameters[n].detach() - self._anchor[n] for n in grads]
        penalty_norm = torch.stack(torch._foreach_norm(penalty)).norm()
        return float(penalty_norm / torch.stack(torch._foreach_norm(list(grads.values()))).norm())

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
        dual_step: float = 1.0,
        untrained: Collection[str] = (),
    ) -> None:
        """θ ← Π(w − λ/μ); λ ← λ − s·μ(w − Δ(θ)); μ ← ``next_mu``.

        Args:
            weights: The network's parameters.
            bound: The scheme to project onto.
            next_mu: Penalty weight of the coming L-step.
            dual_step: The step length s in [0, 1]: 1 is the method of multipliers after a solved
                L-step, 0 the quadratic penalty method.
            untrained: Parameters that the L-step cannot move. Their λ stays zero: it would only
                wind up, and pull their θ away from w.
        """
        shifted = self.shifted(weights)
        theta = bound.pi(shifted)
        for name, encoded in theta.items():
            decoded = encoded.decode()
            anchor = next_mu * decoded
            if self.mu > 0 and name not in untrained:
                # λ = μ(w − shifted), so λ − sμ(w − Δ(θ)) is μ((1 − s)w − shifted + sΔ(θ)).
                dual = weights[name].detach().lerp(decoded, dual_step) - shifted[name]
                anchor += self.mu * dual
            self._anchor[name] = anchor
        self.theta = theta
        self.mu = next_mu

    def set_mu(self, mu: float) -> None:
        """Change μ in the middle of an L-step, keeping λ."""
        for name, anchor in self._anchor.items():
            anchor += (mu - self.mu) * self.theta[name].decode()
        self.mu = mu

    @torch.no_grad()
    def gap(self, weights: Mapping[str, Tensor]) -> float:
        """‖w − Δ(θ)‖ / ‖Δ(θ)‖ over all compressed parameters."""
        decoded = [e.decode() for e in self.theta.values()]
        distance = torch.stack(
            [torch.dist(weights[n].detach(), d) for n, d in zip(self.theta, decoded, strict=True)]
        )
        norm = torch.stack([d.norm() for d in decoded]).norm()
        return float(distance.norm() / norm.clamp_min(torch.finfo(norm.dtype).tiny))

    def state_dict(self) -> dict[str, Any]:
        """μ, θ and the anchors as plain tensors."""
        return {
            "mu": self.mu,
            "anchor": dict(self._anchor),
            "theta": {n: encoded_state(e) for n, e in self.theta.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, on the devices of the current tensors."""
        for name, encoded in self.theta.items():
            device = encoded.codes.device
            self.theta[name] = encoded_from_state(state["theta"][name], device)
            self._anchor[name] = state["anchor"][name].to(device).clone()
        self.mu = float(state["mu"])


def encoded_state(encoded: Encoded) -> dict[str, Any]:
    """One encoding as plain tensors and names, for checkpoints."""
    return {
        "codes": encoded.codes,
        "dtype": str(encoded.dtype).removeprefix("torch."),
        "scale": encoded.scale,
        "mask": encoded.mask,
    }


def encoded_from_state(state: Mapping[str, Any], device: torch.device) -> Encoded:
    """The encoding that :func:`encoded_state` described."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device).clone()

    return Encoded(
        codes=state["codes"].to(device).clone(),
        dtype=getattr(torch, state["dtype"]),
        scale=moved(state["scale"]),
        mask=moved(state["mask"]),
    )
