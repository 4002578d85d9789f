"""Collecting what the operators of a network do to its channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_condensa.graph.channels import FIXED, ChannelGraph, Resize
from lightning_condensa.graph.definitions import Definition, Values


class GraphBuilder:
    """Collects channels, ties and pins, and makes a :class:`ChannelGraph` of them.

    Some pins depend on what is tied in the end, and are judged then: heads, say, can be split off a
    dimension and put back, as long as they go as a whole.
    """

    def __init__(self) -> None:
        self._count = 1
        self._definitions: list[Definition] = []
        self._ties: list[Tensor] = []
        self._pins: list[tuple[Tensor, str]] = [(torch.tensor([FIXED]), "an input or a constant")]
        self._axes: dict[tuple[str, int], Tensor] = {}
        self._values: dict[str, Tensor] = {}
        self._cuts: list[tuple[Tensor, int, str]] = []
        self._reshapes: list[_Reshape] = []
        self._resizes: list[tuple[Tensor, Where]] = []
        self._alike: list[tuple[Tensor, ...]] = []

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

    def cut(self, channels: Tensor, dim: int, reason: str) -> None:
        """Say that channels cannot be removed if they differ along a dimension."""
        self._cuts.append((compact(channels), dim, reason))

    def reshape(self, before: Tensor, after: Tensor, asked: Sequence[Any], where: Where) -> None:
        """Say that a flow is brought into another shape.

        Args:
            before: The flow.
            after: The same elements in the other shape.
            asked: That shape as the code has it, with -1 where it is left open.
            where: Who asked.
        """
        self._reshapes.append(_Reshape(before, after, tuple(asked), where))

    def resize(self, channels: Tensor, where: Where) -> None:
        """Say that code spells out a size, of a dimension along which there are these channels."""
        self._resizes.append((channels, where))

    def alike(self, channels: Sequence[Tensor]) -> None:
        """Say that as many channels have to be left of each of some vectors."""
        self._alike.append(tuple(channels))

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
        for channels, dim, reason in self._cuts:
            if dim in varying(groups[channels]):
                self.pin(channels, reason)
        for reshape in self._reshapes:
            self._check(reshape, groups)
        resizes = [Resize(w.path, w.layer, groups[channels]) for channels, w in self._resizes]
        pinned: dict[int, str] = {}
        for channels, reason in self._pins:
            for group in set(groups[channels].tolist()):
                pinned.setdefault(group, reason)
        alike = tuple(tuple(groups[each] for each in vectors) for vectors in self._alike)
        return ChannelGraph(tuple(self._definitions), groups, axes, pinned, tuple(resizes), alike)

    def _check(self, reshape: _Reshape, groups: Tensor) -> None:
        """Pin channels that a change of shape cannot follow, and note sizes that it spells out."""
        along = [varying(groups[compact(flow)]) for flow in (reshape.before, reshape.after)]
        if any(len(dims) > 1 for dims in along):  # what is left would not be rectangular
            self.pin(reshape.before, f"brought into a fixed shape by {reshape.where.operator}")
        elif along[1] and reshape.asked[along[1][0]] != -1:
            after = reshape.after.movedim(along[1][0], 0).flatten(1)[:, 0]
            self.resize(after, reshape.where)


class Where(NamedTuple):
    """Who calls an operator.

    Attributes:
        operator: The operator's name.
        path: Name of the module whose forward pass calls it.
        layer: The class of that module.
    """

    operator: str
    path: str
    layer: str


class _Reshape(NamedTuple):
    """See :meth:`GraphBuilder.reshape`."""

    before: Tensor
    after: Tensor
    asked: tuple[Any, ...]
    where: Where


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
