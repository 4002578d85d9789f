"""Which channels can be taken out without changing what a network computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_condensa.graph.channels import ChannelGraph


def removable(graph: ChannelGraph, tensors: Mapping[str, Tensor]) -> Tensor:
    """The groups of channels that no output depends on.

    A group goes when everything that reads one of its channels sees a zero, has a zero weight for
    it, or goes itself. Pinned groups stay, and so does one index of every axis.

    Args:
        graph: The channels of a module.
        tensors: Its parameters and buffers by name, on the CPU.

    Returns:
        Boolean, shape ``(channels,)``; only entries of groups (their lowest channels) count.
    """
    zero = graph.zeros(tensors)
    alive = torch.zeros(len(graph.groups), dtype=torch.bool)
    alive[list(graph.pinned)] = True
    readers = []
    for product in graph.products:
        reads = product.connected(tensors[product.weight]) & ~zero[product.inputs][:, None]
        outputs = graph.groups[product.outputs].view(len(product.inputs), -1)
        readers.append((reads, graph.groups[product.inputs], outputs))
    while True:
        before = alive.clone()
        for reads, inputs, outputs in readers:
            needed = (reads & alive[outputs][:, :, None]).any(1)
            alive[inputs[needed]] = True
        if torch.equal(alive, before):  # only now is it clear which axes would be left with nothing
            empty = [g for g in graph.axes.values() if len(g) and not bool(alive[g].any())]
            if not empty:
                return ~alive
            alive[empty[0][0]] = True
