"""Putting other values into a module's parameters for a while."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


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
