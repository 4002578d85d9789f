"""What an L-C algorithm does between and at its C-steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_condensa.schemes import BoundScheme, Encoding

Parameters = Mapping[str, Tensor]


class Engine(ABC):
    """The variables of L-C beside w, and the steps that change them.

    Methods that take ``parameters`` may change the live parameters or their gradients in place.
    """

    @abstractmethod
    def before_step(self, parameters: Parameters, only: Collection[int] | None) -> None:
        """Prepare the gradients for the optimizer.

        Args:
            parameters: The compressed parameters by name.
            only: ``id`` of the parameters that the optimizer trains; all of them where ``None``.
        """

    @abstractmethod
    def after_step(self, parameters: Parameters) -> None:
        """Follow an optimizer step."""

    def latent(self, weights: Parameters) -> dict[str, Tensor]:
        """What C-steps project, where that is not the weights that the network computes with."""
        return dict(weights)

    @abstractmethod
    def observe(
        self, bound: BoundScheme, parameters: Parameters, only: Collection[int] | None
    ) -> None:
        """Look at the loss gradient, in the last optimizer steps before a C-step."""

    @property
    def cuts(self) -> bool:
        """Whether what is pruned is out of training: zero, and staying there."""
        return False

    @property
    def gradient_ratio(self) -> float | None:
        """‖penalty gradient‖ / ‖loss gradient‖ in the last optimizer step, where there is one."""
        return None

    @abstractmethod
    def c_step(
        self,
        parameters: Parameters,
        bound: BoundScheme,
        strength: float,
        rounding: float,
        optimizers: Iterable[Optimizer],
    ) -> dict[str, Encoding]:
        """Project; returns θ.

        Args:
            parameters: The compressed parameters by name.
            bound: The scheme to project onto.
            strength: Of the penalty in the L-step that begins.
            rounding: How far rounded weights then are on the way to Δ(θ).
            optimizers: All that train the network.
        """

    @abstractmethod
    def enter_l_step(
        self, parameters: Parameters, optimizers: Iterable[Optimizer], fixed_support: bool
    ) -> None:
        """Begin an L-step from θ of the C-step just made.

        Args:
            parameters: The compressed parameters by name.
            optimizers: All that train the network.
            fixed_support: Whether from now on only what θ keeps is trained.
        """

    @abstractmethod
    def project(self, parameters: Parameters, bound: BoundScheme) -> dict[str, Encoding]:
        """θ under the final scheme, as it would be deployed now, of weights as given."""

    def finish(self, parameters: Parameters, bound: BoundScheme) -> dict[str, Encoding]:
        """θ at the end of training, of weights as given."""
        return self.project(parameters, bound)

    @abstractmethod
    def state_dict(self, parameters: Parameters) -> dict[str, Any]:
        """All variables: tensors, those of a sharded parameter sharded alike, and numbers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any], parameters: Parameters) -> None:
        """Take up what :meth:`state_dict` gave, on the parameters' devices."""
