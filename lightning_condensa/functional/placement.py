"""Where the parts of a tensor lie that is spread over processes (``DTensor``).

The package computes on the part that a process holds (:func:`local`), asks
:class:`lightning_condensa.functional.ranks.Ranks` for totals over all parts, and wraps its results
like its inputs (:func:`like`). For a plain tensor each function here is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lightning_condensa.functional.masks import inside


def sharded_dim(placement: Placement) -> int | None:
    """The dimension that a placement shards, if it does; strided shards may be no ``Shard``."""
    dim: int | None = getattr(placement, "dim", None)
    return dim


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All elements, on every process that holds some: a collective call for a DTensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Parts that are kept on the CPU travel between the devices of the mesh.
    there = like(tensor.to_local().to(tensor.device_mesh.device_type), tensor)
    return cast(DTensor, there).full_tensor().to(tensor.device)


def part(full: Tensor, reference: Tensor, dim: int | None = None) -> Tensor:
    """This process's part of a tensor that is whole on all of them.

    Args:
        full: The whole tensor, which may have extent 1 where ``reference`` is not sharded.
        reference: How it is cut.
        dim: Cut along this dimension only.

    Returns:
        A view.
    """
    if not isinstance(reference, DTensor):
        return full
    mesh = reference.device_mesh
    coordinates = mesh.get_coordinate() or ()
    for i, (place, placement) in enumerate(zip(coordinates, reference.placements, strict=True)):
        if sharded_dim(placement) is not None and dim in (None, sharded_dim(placement)):
            # DTensor's own way to cut: right for strided and uneven shards, and no communication.
            split = cast(Any, placement)._split_tensor
            full = split(full, mesh.size(i), with_padding=False)[0][place]
    return full


def broadcast_part(full: Tensor, reference: Tensor) -> Tensor:
    """This process's part of a whole tensor that broadcasts with ``reference``.

    It is cut along the dimensions in which it has more than one element. A view.
    """
    for dim, extent in enumerate(full.shape):
        if extent > 1:
            full = part(full, reference, dim)
    return full


def parts(tensors: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of this process's parts of tensors, on the devices of their references.

    Args:
        tensors: By name; whole, such as those of a checkpoint, or placed like their references.
        references: How each is cut; at least one for each name.
    """
    cut = {
        name: local(tensor) if isinstance(tensor, DTensor) else part(tensor, references[name])
        for name, tensor in tensors.items()
    }
    return {name: t.to(references[name].device, copy=True) for name, t in cut.items()}


def like(part: Tensor, reference: Tensor, shape: torch.Size | None = None) -> Tensor:
    """A tensor placed like ``reference``, of which this process holds ``part``.

    Args:
        part: The local part; the result itself where ``reference`` is a plain tensor.
        reference: Where the parts lie.
        shape: Shape of the whole; that of ``reference`` if not given.
    """
    if not isinstance(reference, DTensor):
        return part
    return _wrap(part, reference.device_mesh, reference.placements, shape or reference.shape)


def shrunk(part: Tensor, reference: Tensor, dims: Collection[int]) -> Tensor:
    """A tensor with extent 1 along all but some dimensions, placed to broadcast with ``reference``.

    Args:
        part: What this process holds of it.
        reference: A tensor with as many dimensions.
        dims: The dimensions that are kept, and sharded like those of ``reference``.
    """
    if not isinstance(reference, DTensor):
        return part
    placements = [p if sharded_dim(p) in dims else Replicate() for p in reference.placements]
    shape = torch.Size(n if dim in dims else 1 for dim, n in enumerate(reference.shape))
    return _wrap(part, reference.device_mesh, placements, shape)


def elementwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function`` on the parts of tensors that are placed alike, or broadcast alike."""
    return like(function(*map(local, tensors)), tensors[0])


def where(mask: Tensor, values: Tensor) -> Tensor:
    """``values`` inside the mask and exact zeros elsewhere, placed like ``values``."""
    return elementwise(inside, placed(mask, values), values)


def placed(tensor: Tensor, reference: Tensor) -> Tensor:
    """The same values placed like ``reference``, which has the same shape.

    Between two ways to shard over one mesh each process sends what another one needs. To a plain
    tensor, or another mesh, the values are made whole first: meant for small ones.
    """
    if isinstance(tensor, DTensor) and isinstance(reference, DTensor):
        mesh, placements = reference.device_mesh, reference.placements
        if tensor.device_mesh == mesh:
            alike = tensor.placements == placements
            return tensor if alike else tensor.redistribute(mesh, placements)
    if not isinstance(reference, DTensor):
        return whole(tensor)
    return like(part(whole(tensor), reference).clone(), reference)  # a view would keep the whole


def flat(tensor: Tensor) -> Tensor:
    """All elements in row-major order; a DTensor of several dimensions is made whole."""
    if not isinstance(tensor, DTensor):
        return tensor.reshape(-1)
    return tensor if tensor.dim() == 1 else whole(tensor).reshape(-1)


def uncut(tensor: Tensor, unit: Sequence[int | None], name: str) -> Tensor:
    """The same values, sharded so that no group of elements lies in two shards.

    Where the tensor's own placement cuts groups, it is sharded along another dimension instead:
    every process still holds one part in as many.

    Args:
        tensor: Any tensor; a plain one is returned as it is.
        unit: Extent of a group along each dimension; ``None`` for one that may not be sharded.
        name: For the error.

    Raises:
        ValueError: If every dimension cuts groups.
    """
    if not isinstance(tensor, DTensor) or _fits(tensor, tensor.placements, unit):
        return tensor
    given = tensor.placements
    if all(type(p) is Shard or p.is_replicate() for p in given):
        dims = [Shard(dim) for dim in range(tensor.dim())]
        ways = product(*([p] if p.is_replicate() else dims for p in given))
        fitting = [way for way in ways if _fits(tensor, way, unit)]
        if fitting:  # as few axes of the mesh as may be move
            moved = [sum(p != q for p, q in zip(way, given, strict=True)) for way in fitting]
            return tensor.redistribute(placements=fitting[moved.index(min(moved))])
    raise ValueError(
        f"{name} {tuple(tensor.shape)}, placed {tensor.placements} on {tensor.device_mesh}, cannot "
        f"be sharded without cutting the groups of {tuple(unit)}: choose groups that divide the "
        "shards, or leave it out with exclude="
    )


def reshard(module: nn.Module) -> None:
    """Let a module have its own parts of sharded parameters (FSDP2), to be read and written.

    After a forward pass without a backward pass it may have copies of all parts, which would
    outlive a change of the parts themselves.
    """
    for layer in module.modules():
        if isinstance(layer, FSDPModule):
            layer.reshard()


def part_shape(tensor: Tensor, shape: torch.Size) -> torch.Size:
    """The shape of this process's part of a tensor of ``shape`` placed like ``tensor``."""
    return part(torch.empty(shape, device="meta"), tensor).shape


def linear_indices(tensor: Tensor, positions: Tensor) -> Tensor:
    """Row-major indices in the whole tensor of flat positions in this process's part of it."""
    if not isinstance(tensor, DTensor):
        return positions
    result = torch.zeros_like(positions)
    extents = tensor.to_local().shape
    for dim, extent in enumerate(tensor.shape):
        # The coordinates along one dimension, cut as that dimension is.
        shape = [1] * tensor.dim()
        shape[dim] = extent
        mine = part(torch.arange(extent, device=positions.device).view(shape), tensor, dim)
        mine = mine.flatten()
        within = positions // math.prod(extents[dim + 1 :]) % max(extents[dim], 1)
        result += mine[within] * math.prod(tensor.shape[dim + 1 :])
    return result


def _fits(tensor: DTensor, placements: Sequence[Placement], unit: Sequence[int | None]) -> bool:
    """Whether shards end only where groups do."""
    for dim, (extent, group) in enumerate(zip(tensor.shape, unit, strict=True)):
        cuts = [i for i, p in enumerate(placements) if sharded_dim(p) == dim]
        if not cuts or group == 1:
            continue
        if group is None or any(type(placements[i]) is not Shard for i in cuts):
            return False
        shards = [range(extent)]
        for i in cuts:
            shards = [part for s in shards for part in _chunks(s, tensor.device_mesh.size(i))]
        if any(s and s[0] % group for s in shards):
            return False
    return True


def _chunks(extent: range, count: int) -> list[range]:
    """As ``torch.chunk`` cuts: all of one size, but for the last."""
    size = max(math.ceil(len(extent) / count), 1)
    return [extent[start : start + size] for start in range(0, len(extent), size)]


def _wrap(
    part: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size
) -> Tensor:
    stride = torch.empty(shape, device="meta").stride()
    part = part.contiguous()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
