"""Collecting what the operators of a network do to its channels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_condensa.graph.channels import FIXED, ChannelGraph
from lightning_condensa.graph.definitions import Definition, Values


class GraphBuilder:
    """Collects channels, ties and pins, and makes a :class:`ChannelGraph` of them."""

    def __init__(self) -> None:
        self._count = 1
        self._definitions: list[Definition] = []
        self._ties: list[Tensor] = []
        self._pins: list[tuple[Tensor, str]] = [(torch.tensor([FIXED]), "an input or a constant")]
        self._axes: dict[tuple[str, int], Tensor] = {}
        self._values: dict[str, Tensor] = {}

    def new(self, count: int) -> Tensor:
        """So many channels that are in no group yet."""
        self._count += count
        return torch.arange(self._count - count, self._count)

    def define(self, definition: Definition) -> None:
        """Add how channels come about."""
        self._definitions.append(definition)

    def fix(self, name: str, shape: torch.Size) -> None:
        """Say that nothing of a parameter or buffer can be removed."""
        for dim, extent in enumerate(shape):
            self.axis(name, dim, torch.full((extent,), FIXED))

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Put channels into the same groups, one by one; shapes broadcast."""
        shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
        self._ties.append(torch.stack([t.expand(shape).flatten() for t in (a, b)]))

    def pin(self, channels: Tensor, reason: str) -> None:
        """Say that channels cannot be removed."""
        self._pins.append((compact(channels).flatten(), reason))

    def axis(self, name: str | None, dim: int, channels: Tensor) -> None:
        """Say which channels lie along a dimension of a parameter or buffer, if there is one."""
        if name is not None:
            known = self._axes.setdefault((name, dim), channels)
            self.tie(known, channels)

    def values(self, name: str, shape: torch.Size) -> Tensor:
        """The elements of a parameter or buffer as channels, of its shape."""
        if name not in self._values:
            channels = self.new(shape.numel())
            self.define(Values(channels, name, shape))
            self._values[name] = channels.view(shape)
        return self._values[name]

    def finish(self) -> ChannelGraph:
        """The graph."""
        ties = torch.cat([torch.empty(2, 0, dtype=torch.long), *self._ties], dim=1)
        groups = connected_components(self._count, ties)
        axes = {key: groups[channels] for key, channels in self._axes.items()}
        for name, channels in self._values.items():
            others = [c for (owner, _), c in self._axes.items() if owner == name]
            along = varying(groups[channels])
            if len(along) == 1 and not others:
                index = [0 if d != along[0] else slice(None) for d in range(channels.dim())]
                axes[name, along[0]] = groups[channels][tuple(index)]
            else:
                for each in (channels, *others):
                    self.pin(each, f"{name} cannot be cut along one dimension")
        pinned: dict[int, str] = {}
        for channels, reason in self._pins:
            for group in set(groups[channels].tolist()):
                pinned.setdefault(group, reason)
        return ChannelGraph(tuple(self._definitions), groups, axes, pinned)


def connected_components(count: int, edges: Tensor) -> Tensor:
    """The least node of each node's component.

    Args:
        count: Number of nodes.
        edges: Pairs of nodes, shape ``(2, n)``.

    Returns:
        Shape ``(count,)``.

    Example:
        >>> connected_components(5, torch.tensor([[3, 1], [2, 3]]))
        tensor([0, 1, 1, 1, 4])
    """
    a, b = edges
    label = torch.arange(count)
    while True:
        low = torch.minimum(label[a], label[b])
        new = label
        for nodes in (a, b, label[a], label[b]):  # roots, too: whole components move at once
            new = new.scatter_reduce(0, nodes, low, "amin")
        new = new[new]
        if torch.equal(new, label):
            return label
        label = new


def compact(channels: Tensor) -> Tensor:
    """Without the repetitions that ``expand`` makes: a size of 1 where the stride is 0."""
    for dim, stride in enumerate(channels.stride()):
        if stride == 0 and channels.shape[dim] > 1:
            channels = channels.narrow(dim, 0, 1)
    return channels


def varying(channels: Tensor) -> list[int]:
    """The dimensions along which channels differ."""
    few = compact(channels)
    sizes = enumerate(few.shape)
    return [d for d, n in sizes if n > 1 and bool((few != few.narrow(d, 0, 1)).any())]
