"""Which channels can be taken out without changing what a network computes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lightning_condensa.graph.channels import ChannelGraph


def removable(
    graph: ChannelGraph, tensors: Mapping[str, Tensor], kept: Collection[int] = ()
) -> Tensor:
    """The groups of channels that no output depends on.

    A group goes when everything that reads one of its channels sees a zero, has a zero weight for
    it, or goes itself. Pinned groups stay, and one index of every axis; of vectors that have
    to stay alike as many as of the longest.

    Args:
        graph: The channels of a module.
        tensors: Its parameters and buffers by name, on the CPU.
        kept: Groups that stay in any case.

    Returns:
        Boolean, shape ``(channels,)``; only entries of groups (their lowest channels) count.
    """
    zero = graph.zeros(tensors)
    alive = torch.zeros(len(graph.groups), dtype=torch.bool)
    alive[[*graph.pinned, *kept]] = True
    readers = [
        (reads.connected, graph.groups[reads.inputs], graph.groups[reads.outputs])
        for definition in graph.definitions
        for reads in definition.reads(zero, tensors)
    ]
    while True:
        before = alive.clone()
        for connected, inputs, outputs in readers:
            needed = (connected & alive[outputs][:, :, None]).any(1)
            alive[inputs[needed]] = True
        if torch.equal(alive, before):  # only now is it clear which axes would be left with nothing
            back = _missing(graph, alive)
            if back is None:
                return ~alive
            alive[back] = True


def _missing(graph: ChannelGraph, alive: Tensor) -> Tensor | None:
    """Groups that have to stay though nothing needs them; ``None`` if there are none."""
    for groups in graph.axes.values():
        if len(groups) and not bool(alive[groups].any()):
            return groups[0]
    for vectors in graph.alike:
        left = [int(alive[groups].sum()) for groups in vectors]
        for groups, count in zip(vectors, left, strict=True):
            if count < max(left):
                return groups[~alive[groups]][: max(left) - count]
    return None
