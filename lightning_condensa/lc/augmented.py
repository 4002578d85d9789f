"""The published L-C: an augmented Lagrangian whose penalty enters as a gradient."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_condensa.lc.engine import Engine, Parameters
from lightning_condensa.lc.lagrangian import Lagrangian
from lightning_condensa.schemes import BoundScheme, Encoding


class Augmented(Engine):
    """L-C with ``μ(w − Δ(θ)) − λ`` added to the gradient.

    Buffers, each of the parameter's size: θ and ``μΔ(θ) + λ``.
    """

    def __init__(self) -> None:
        self._lagrangian: Lagrangian | None = None
        self._trained_since = False
        self._gradient_ratio: float | None = None

    @property
    def lagrangian(self) -> Lagrangian:
        """θ, λ and μ.

        Raises:
            RuntimeError: Before the first C-step.
        """
        if self._lagrangian is None:
            raise RuntimeError("there is no θ before the first C-step")
        return self._lagrangian

    @property
    def gradient_ratio(self) -> float | None:
        """‖penalty gradient‖ / ‖loss gradient‖ when last observed; ``None`` before."""
        return self._gradient_ratio

    def observe(
        self, bound: BoundScheme, parameters: Parameters, only: Collection[int] | None
    ) -> None:
        """Compare the penalty's gradient with the loss's."""
        self._gradient_ratio = self.lagrangian.gradient_ratio(parameters)

    def before_step(self, parameters: Parameters, only: Collection[int] | None) -> None:
        """Add the gradient of the penalty."""
        self.lagrangian.add_penalty_gradient(parameters, only)

    def after_step(self, parameters: Parameters) -> None:
        """Note that w has moved."""
        self._trained_since = True

    def c_step(
        self,
        parameters: Parameters,
        bound: BoundScheme,
        strength: float,
        rounding: float,
        optimizers: Iterable[Optimizer],
    ) -> dict[str, Encoding]:
        """``θ ← Π(w − λ/μ)``, ``λ ← λ − μ(w − Δ(θ))``, ``μ ← strength``."""
        if self._lagrangian is None:
            self._lagrangian = Lagrangian(bound.pi(parameters), strength)
        else:
            groups = (g for optimizer in optimizers for g in optimizer.param_groups)
            trained = {id(p) for g in groups for p in g["params"] if p.requires_grad}
            untrained = {n for n, p in parameters.items() if id(p) not in trained}
            self._lagrangian.c_step(parameters, bound, strength, untrained)
        self._trained_since = False
        return dict(self._lagrangian.theta)

    def enter_l_step(
        self, parameters: Parameters, optimizers: Iterable[Optimizer], fixed_support: bool
    ) -> None:
        """Nothing: the penalty alone leads w to Δ(θ)."""

    def project(self, parameters: Parameters, bound: BoundScheme) -> dict[str, Encoding]:
        """The last C-step's θ.

        Once λ has moved, ``Π(w − λ/μ)`` means something only at the end of the next L-step.
        """
        return dict(self.lagrangian.theta)

    def finish(self, parameters: Parameters, bound: BoundScheme) -> dict[str, Encoding]:
        """The last C-step's θ; an L-step that was cut short ends with a projection."""
        if self._trained_since:
            return bound.pi(self.lagrangian.shifted(parameters))
        return self.project(parameters, bound)

    def state_dict(self, parameters: Parameters) -> dict[str, Any]:
        """θ, λ and μ."""
        return {"trained_since": self._trained_since, "lagrangian": self.lagrangian.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Parameters) -> None:
        """Take up what :meth:`state_dict` gave, on the parameters' devices."""
        self._trained_since = state["trained_since"]
        self._lagrangian = Lagrangian.from_state(state["lagrangian"], parameters)
