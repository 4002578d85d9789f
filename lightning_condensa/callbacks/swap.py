"""Putting other values into a module's parameters for a while."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor, nn


class WeightSwap:
    """Exchanges training weights for deployed ones and back, bit for bit.

    Args:
        parameters: The live parameters by name.

    Attributes:
        parameters: The live parameters by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        self._stash: dict[str, Tensor] | None = None

    @property
    def training_weights(self) -> dict[str, Tensor]:
        """The training weights, wherever they are at the moment."""
        live = {name: p.detach() for name, p in self.parameters.items()}
        return live if self._stash is None else self._stash

    @torch.no_grad()
    def swap_in(self, values: Mapping[str, Tensor]) -> None:
        """Set the training weights aside and put ``values`` into the parameters."""
        if self._stash is not None:
            raise RuntimeError("the deployed weights are swapped in already")
        # Evaluation runs in inference mode; the stash must outlive it as ordinary tensors.
        with torch.inference_mode(False):
            self._stash = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy(values)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Put the training weights back; nothing happens where they are in place."""
        if self._stash is not None:
            stash, self._stash = self._stash, None
            self.copy(stash)

    @torch.no_grad()
    def copy(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite the parameters with ``values``."""
        for name, value in values.items():
            self.parameters[name].detach().copy_(value)

    def overwrite(
        self, state: MutableMapping[str, Tensor], module: nn.Module, values: Mapping[str, Tensor]
    ) -> None:
        """Put ``values`` into a state dict of ``module``.

        They go under every name of a parameter that layers share, or a stale one would be loaded
        over the new one.
        """
        names = {id(p): name for name, p in self.parameters.items()}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) in names and name in state:
                state[name] = values[names[id(parameter)]]
