"""A shrink plan: which indices of which tensors are kept; how a module is cut by it."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_condensa.deploy.checked_json import (
    dump_json,
    load_json,
    require_count,
    require_list,
    require_object,
)
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.spec import MAX_DIMENSIONS, MAX_NUMEL, MAX_SPEC_BYTES
from lightning_condensa.graph import ChannelGraph
from lightning_condensa.graph.liveness import removable

#: Parameter or buffer → dimension → indices that are kept, ascending.
Plan: TypeAlias = Mapping[str, Mapping[int, Sequence[int]]]


def make_plan(
    graph: ChannelGraph, tensors: Mapping[str, Tensor]
) -> dict[str, dict[int, list[int]]]:
    """The plan that takes out every channel that no output depends on.

    Args:
        graph: The channels of a module.
        tensors: Its parameters and buffers by name, on the CPU.
    """
    gone = removable(graph, tensors)
    plan: dict[str, dict[int, list[int]]] = {}
    for (name, dim), groups in graph.axes.items():
        if bool(gone[groups].any()):
            kept = (~gone[groups]).nonzero().flatten().tolist()
            plan.setdefault(name, {})[dim] = kept
    return plan


@torch.no_grad()
def apply_plan(module: nn.Module, plan: Plan) -> None:
    """Cut a module, in place, and correct what its layers say about their sizes.

    Layers of torch are corrected (``in_features``, ``groups``, …); an attribute of the module's own
    that repeats such a size is not.

    Args:
        module: A module of the class and size that the plan was made of.
        plan: What is kept.

    Raises:
        ValueError: If the plan does not fit the module.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> kept = [0, 2]
        >>> apply_plan(net, {"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}})
        >>> net[0], net(torch.zeros(1, 4)).shape
        (Linear(in_features=4, out_features=2, bias=True), torch.Size([1, 2]))
    """
    tensors = dict(_tensors(module))
    check_plan(plan, {name: tensor.shape for name, tensor in tensors.items()})
    before = {layer: _weight_shape(layer) for layer in module.modules()}
    smaller = {id(tensors[name]): cut(tensors[name], dims) for name, dims in plan.items()}
    for name, tensor in tensors.items():  # all names of a tied one
        if id(tensor) in smaller:
            owner, _, attribute = name.rpartition(".")
            value = smaller[id(tensor)]
            if isinstance(tensor, nn.Parameter) and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, tensor.requires_grad)
                smaller[id(tensor)] = value
            setattr(module.get_submodule(owner), attribute, value)
    for layer, shape in before.items():
        if _weight_shape(layer) != shape:
            _correct(layer, shape)


def check_plan(plan: Plan, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ``ValueError`` unless a plan fits tensors of these shapes."""
    for name, dims in plan.items():
        if name not in shapes:
            raise ValueError(f"the plan cuts {name!a}, which the module does not have")
        for dim, kept in dims.items():
            if not 0 <= dim < len(shapes[name]):
                raise ValueError(f"the plan cuts dimension {dim} of {name} {tuple(shapes[name])}")
            ascending = all(a < b for a, b in pairwise(kept))
            if not kept or not ascending or kept[0] < 0 or kept[-1] >= shapes[name][dim]:
                raise ValueError(
                    f"the plan must keep ascending indices below {shapes[name][dim]} in dimension "
                    f"{dim} of {name}, got {list(kept[:5])}"
                )


def cut(tensor: Tensor, dims: Mapping[int, Sequence[int]]) -> Tensor:
    """The kept part of a tensor, as a copy.

    Args:
        tensor: Any tensor.
        dims: Dimension → indices that are kept.
    """
    part = tensor.detach()
    for dim, kept in dims.items():
        part = part.index_select(dim, torch.tensor(kept, device=part.device))
    return part


def plan_to_json(plan: Plan) -> str:
    """The plan as JSON.

    Example:
        >>> plan_to_json({"0.weight": {0: [0, 2]}})
        '{"0.weight":{"0":[0,2]}}'
    """
    plain = {n: {str(d): list(kept) for d, kept in dims.items()} for n, dims in plan.items()}
    return dump_json(plain).decode()


def plan_from_json(text: str) -> dict[str, dict[int, list[int]]]:
    """The plan that :func:`plan_to_json` wrote.

    Raises:
        PackedFileError: If the text is none.
    """
    plan: dict[str, dict[int, list[int]]] = {}
    for name, dims in require_object(load_json(text.encode(), "the plan"), "the plan").items():
        cuts = require_object(dims, f"the plan of {name!a}")
        plan[name] = {
            _dimension(dim): [
                require_count(i, "an index", MAX_NUMEL) for i in require_list(kept, "indices")
            ]
            for dim, kept in cuts.items()
        }
    return plan


def plan_to_text(plan: Plan) -> str:
    """The plan as a file holds it: its JSON, compressed with zlib, in base64."""
    return base64.b64encode(zlib.compress(plan_to_json(plan).encode(), 9)).decode()


def plan_from_text(text: str) -> dict[str, dict[int, list[int]]]:
    """The plan that :func:`plan_to_text` wrote.

    Raises:
        PackedFileError: If the text is none, or too long.
    """
    decompressor = zlib.decompressobj()
    try:
        data = decompressor.decompress(base64.b64decode(text, validate=True), MAX_SPEC_BYTES)
        json = data.decode()
    except (ValueError, zlib.error) as error:
        raise PackedFileError(f"the plan is damaged: {error}") from None
    if not decompressor.eof or decompressor.unused_data:
        raise PackedFileError(f"the plan is damaged, or has more than {MAX_SPEC_BYTES} bytes")
    return plan_from_json(json)


def _dimension(text: str) -> int:
    if text not in map(str, range(MAX_DIMENSIONS)):
        raise PackedFileError(f"a dimension must be a number below {MAX_DIMENSIONS}, got {text!a}")
    return int(text)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _weight_shape(layer: nn.Module) -> torch.Size | None:
    for name in ("weight", "running_mean"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor):
            return tensor.shape
    return None


def _correct(layer: nn.Module, before: torch.Size | None) -> None:
    """Let the attributes of a layer agree with its weight, which had another shape before."""
    shape = _weight_shape(layer)
    assert shape is not None and before is not None
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, _ConvNd):
        layer.groups = shape[0] * layer.groups // before[0] if layer.groups > 1 else 1
        sizes = [shape[0], shape[1] * layer.groups]
        if isinstance(layer, _ConvTransposeNd):
            layer.in_channels, layer.out_channels = sizes
        else:
            layer.out_channels, layer.in_channels = sizes
    elif isinstance(layer, _NormBase):
        layer.num_features = shape[0]
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = shape[0]
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = shape[1]
