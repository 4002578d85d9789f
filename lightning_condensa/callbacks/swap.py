"""Putting other values into a module's tensors for a while."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_condensa.callbacks.sharded import gathered
from lightning_condensa.functional.placement import reshard


class WeightSwap:
    """Exchanges training weights for deployed ones and back, bit for bit.

    Args:
        module: The module.
        names: Of its parameters, and of buffers that belong to their values.

    Attributes:
        module: The module.
    """

    def __init__(self, module: nn.Module, names: Collection[str]) -> None:
        self.module = module
        self._names = names
        self._stash: dict[str, Tensor] | None = None

    @property
    def swapped(self) -> bool:
        """Whether deployed weights are in place."""
        return self._stash is not None

    @property
    def live(self) -> dict[str, Tensor]:
        """What is in place at the moment."""
        reshard(self.module)
        # Looked up each time: some callbacks put new buffers into batch norm layers.
        named = dict(chain(self.module.named_parameters(), self.module.named_buffers()))
        return {name: named[name] for name in self._names}

    @property
    def training_weights(self) -> dict[str, Tensor]:
        """The training weights, wherever they are at the moment."""
        if self._stash is not None:
            return self._stash
        return {name: t.detach() for name, t in self.live.items()}

    @torch.no_grad()
    def swap_in(self, values: Mapping[str, Tensor]) -> None:
        """Set all training weights aside, and put ``values`` in place."""
        if self._stash is not None:
            raise RuntimeError("the deployed weights are swapped in already")
        # Evaluation runs in inference mode; the stash must outlive it as ordinary tensors.
        with torch.inference_mode(False):
            self._stash = {name: t.detach().clone() for name, t in self.live.items()}
        self._copy(values)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Put the training weights back; nothing happens where they are in place."""
        if self._stash is not None:
            stash, self._stash = self._stash, None
            self._copy(stash)

    def _copy(self, values: Mapping[str, Tensor]) -> None:
        live = self.live
        for name, value in values.items():
            live[name].detach().copy_(value)

    def overwrite(self, state: MutableMapping[str, Tensor]) -> None:
        """Put copies of what is in place into a state dict of the module.

        They go under every name of a tensor that layers share, or a stale one would be loaded over
        the new one. Of sharded tensors they are sharded where those of the state dict are, and
        whole otherwise: a collective call.
        """
        names = {id(t): name for name, t in self.live.items()}
        copies = {name: t.detach().clone() for name, t in self.live.items()}
        if not any(isinstance(t, DTensor) for t in state.values()):
            copies = gathered(copies)
        named = chain(
            self.module.named_parameters(remove_duplicate=False),
            self.module.named_buffers(remove_duplicate=False),
        )
        for name, tensor in named:
            if id(tensor) in names and name in state:
                state[name] = copies[names[id(tensor)]]
