"""The channel graph: which slices of which parameters belong to the same channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_condensa.graph.definitions import (
    Definition,
    Norm,
    Origins,
    Product,
    Removal,
)

#: The channel of everything that is no channel: inputs, constants.
FIXED = 0


@dataclass(frozen=True, eq=False)
class Resize:
    """A size that code spells out.

    Attributes:
        path: Name of the module whose forward pass does.
        layer: The class of that module.
        groups: The group at each index of the dimension that has this size.
    """

    path: str
    layer: str
    groups: Tensor

    @property
    def reason(self) -> str:
        """Why channels stay where the size cannot follow."""
        return f"{self.layer}.forward spells out a size that no attribute of it can change"


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The channels of a module, and what ties them together.

    Channels that only make sense together (the operands of a sum, the inputs and outputs of a
    depthwise convolution) form a *group*, which is called by its lowest channel.

    Attributes:
        definitions: How channels come about, in the order of computation.
        groups: The group of each channel, shape ``(channels,)``.
        axes: Parameter or buffer, dimension → the group at each index.
        pinned: Groups that cannot be removed, with the reason.
        resizes: Sizes that code spells out, which have to follow when groups are removed.
        alike: Vectors of groups of which as many have to be left: the hidden units of all layers of
            an LSTM.

    Example:
        >>> from lightning_condensa.graph import trace
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
        >>> graph = trace(net, torch.zeros(1, 4))
        >>> graph.axes["0.weight", 0].tolist() == graph.axes["2.weight", 1].tolist()
        True
        >>> sorted(set(graph.pinned.values()))
        ['an input or a constant', 'an output of the network']
    """

    definitions: tuple[Definition, ...] = ()
    groups: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    axes: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    pinned: Mapping[int, str] = field(default_factory=lambda: {FIXED: "an input or a constant"})
    resizes: tuple[Resize, ...] = ()
    alike: tuple[tuple[Tensor, ...], ...] = ()

    @property
    def products(self) -> tuple[Product, ...]:
        """Linear layers and convolutions in the order of computation."""
        return tuple(d for d in self.definitions if isinstance(d, Product))

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Norm layers in the order of computation."""
        return tuple(d for d in self.definitions if isinstance(d, Norm))

    def origins(self, removal: Removal) -> list[Origins]:
        """For each channel the output units that make it zero when all of them are removed.

        Args:
            removal: What can be removed.
        """
        found: list[Origins] = [None] * len(self.groups)
        for definition in self.definitions:
            made = definition.origins(found, removal)
            for channel, origins in zip(definition.outputs.tolist(), made, strict=True):
                found[channel] = origins
        return found

    def zeros(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Which channels are zero for every input, boolean of shape ``(channels,)``.

        Args:
            tensors: The module's parameters and buffers by name, on the CPU.
        """
        zero = torch.zeros(len(self.groups), dtype=torch.bool)
        for definition in self.definitions:
            zero[definition.outputs] = definition.zeros(zero, tensors)
        return zero
