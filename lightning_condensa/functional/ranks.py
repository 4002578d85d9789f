"""Totals over the processes that hold the parts of some tensors.

On its own a process holds everything: then every method is the identity, nothing is communicated,
and whoever uses :class:`Ranks` needs no second code path.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_condensa.functional.placement import local, sharded_dim


class Ranks:
    """Processes that work on one problem together; on its own a process has no groups.

    Every method is a collective call: all processes make the same calls in the same order.

    Attributes:
        groups: Process groups; a sum over each in turn is a sum over all processes.
        device: Where their backend expects tensors.
        leader: The process that counts what all of them hold.
    """

    def __init__(
        self,
        groups: Sequence[dist.ProcessGroup] = (),
        device: torch.device | None = None,
        leader: int = 0,
    ) -> None:
        self.groups = list(groups)
        self.device = device or torch.device("cpu")
        self.leader = leader

    @classmethod
    def holding(cls, tensors: Sequence[Tensor]) -> Ranks:
        """All processes that hold parts of some tensors.

        Raises:
            ValueError: If a tensor is a pending sum (``Partial``), or two lie on meshes of which
                neither is part of the other.
        """
        sharded = [t for t in tensors if isinstance(t, DTensor)]
        for tensor in sharded:
            if any(p.is_partial() for p in tensor.placements):
                raise ValueError(
                    f"a tensor placed {tensor.placements} is not summed yet: redistribute it first"
                )
        if not sharded:
            return cls()
        # In the order of the tensors, which is the same on all processes: a set has none.
        meshes = {m: _members(m) for m in dict.fromkeys(t.device_mesh for t in sharded)}
        widest = max(meshes, key=lambda mesh: mesh.size())
        for mesh, members in meshes.items():
            if not members <= meshes[widest]:
                raise ValueError(
                    "tensors compressed together must lie on one mesh or on parts of it, "
                    f"got {mesh} and {widest}"
                )
        groups = [widest.get_group(i) for i in range(widest.ndim)]
        if dist.group.WORLD is not None and widest.size() == dist.group.WORLD.size():
            groups = [dist.group.WORLD]  # in one go, not axis by axis
        return cls(groups, torch.device(widest.device_type), min(meshes[widest]))

    @classmethod
    def cutting(cls, tensor: Tensor, dims: Collection[int]) -> Ranks:
        """The processes among which a tensor is cut along some dimensions."""
        if not isinstance(tensor, DTensor):
            return cls()
        mesh = tensor.device_mesh
        cuts = [i for i, p in enumerate(tensor.placements) if sharded_dim(p) in dims]
        return cls([mesh.get_group(i) for i in cuts], torch.device(mesh.device_type))

    @property
    def leads(self) -> bool:
        """Whether this process does what one of them has to do for all."""
        return not self.groups or dist.get_rank() == self.leader

    def own(self, tensor: Tensor) -> bool:
        """Whether this process counts its part of ``tensor``: each element is counted once."""
        if not self.groups:
            return True
        if not isinstance(tensor, DTensor):
            return self.leads
        mesh = tensor.device_mesh
        coordinates = mesh.get_coordinate() or ()
        placed = zip(coordinates, tensor.placements, strict=True)
        copies = (c for c, p in placed if sharded_dim(p) is None)
        return self.leader in _members(mesh) and not any(copies)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def maximum(self, tensor: Tensor) -> Tensor:
        """The largest over all processes."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def totals(self, counts: Sequence[int]) -> list[int]:
        """The sums of some counts over all processes."""
        if not self.groups:
            return list(counts)
        totals: list[int] = self.sum(torch.tensor(counts, dtype=torch.int64)).tolist()
        return totals

    def gather(self, values: Tensor) -> Tensor:
        """All processes' values, ``(n,)`` with an n of its own for each, in the same order.

        What is exchanged is the result once, however unevenly the processes contribute to it.
        """
        gathered = values.to(self.device) if self.groups else values
        for group in self.groups:
            lengths = torch.zeros(group.size(), dtype=torch.int64, device=self.device)
            lengths[group.rank()] = gathered.numel()
            dist.all_reduce(lengths, group=group)
            every = gathered.new_zeros(int(lengths.sum()))
            start = int(lengths[: group.rank()].sum())
            every[start : start + gathered.numel()] = gathered
            dist.all_reduce(every, group=group)  # zeros elsewhere: no sum is rounded
            gathered = every
        return gathered.to(values.device)

    def _reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if not self.groups:
            return tensor
        result = tensor.to(self.device, copy=True)
        for group in self.groups:
            dist.all_reduce(result, op, group)
        return result.to(tensor.device)


def count_nonzero(tensors: Sequence[Tensor]) -> list[int]:
    """Non-zero elements of each tensor, those of a DTensor over all its processes."""
    ranks = Ranks.holding(tensors)
    return ranks.totals([_nonzeros(local(t)) if ranks.own(t) else 0 for t in tensors])


def _nonzeros(tensor: Tensor) -> int:
    if tensor.is_floating_point() and tensor.itemsize == 1:  # torch compares them, no more
        return int((tensor != 0).sum())
    return int(tensor.count_nonzero())


def _members(mesh: DeviceMesh) -> set[int]:
    return set(mesh.mesh.flatten().tolist())
