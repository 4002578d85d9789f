"""A shrink plan: which indices of which tensors are kept; how a module is cut by it.

A plan says of parameters and buffers which indices are kept, and of attributes of the user's
modules, which repeat a size that got smaller, what they become.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_condensa.deploy.checked_json import (
    dump_json,
    load_json,
    require_count,
    require_list,
    require_object,
)
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.sizes import correct_sizes, own_shapes
from lightning_condensa.deploy.spec import MAX_DIMENSIONS, MAX_NUMEL, MAX_SPEC_BYTES
from lightning_condensa.graph import ChannelGraph

#: Parameter or buffer → dimension → indices that are kept, ascending.
Cuts: TypeAlias = Mapping[str, Mapping[int, Sequence[int]]]
#: The same, and attribute → the number that it becomes, of modules that hold a size themselves.
Plan: TypeAlias = Mapping[str, Mapping[int, Sequence[int]] | int]


def cuts_of(plan: Plan) -> dict[str, Mapping[int, Sequence[int]]]:
    """The part of a plan that is about parameters and buffers."""
    return {name: dims for name, dims in plan.items() if not isinstance(dims, int)}


def make_cuts(graph: ChannelGraph, gone: Tensor) -> dict[str, dict[int, list[int]]]:
    """What is kept of parameters and buffers where channels are taken out.

    Args:
        graph: The channels of a module.
        gone: The groups that go: see :func:`~lightning_condensa.graph.liveness.removable`.
    """
    plan: dict[str, dict[int, list[int]]] = {}
    for (name, dim), groups in graph.axes.items():
        if bool(gone[groups].any()):
            kept = (~gone[groups]).nonzero().flatten().tolist()
            plan.setdefault(name, {})[dim] = kept
    return plan


@torch.no_grad()
def apply_plan(module: nn.Module, plan: Plan) -> None:
    """Cut a module, in place, and correct what its layers say about their sizes.

    Layers of torch are corrected (``in_features``, ``groups``, …), and where heads are gone
    ``nn.MultiheadAttention`` becomes :class:`~lightning_condensa.deploy.heads.FewerHeads`;
    attributes of the module's own are set as the plan says.

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
    check_plan(plan, module)
    before = [(layer, own_shapes(layer)) for layer in module.modules()]
    cuts = cuts_of(plan)
    smaller = {id(tensors[name]): cut(tensors[name], dims) for name, dims in cuts.items()}
    for name, tensor in tensors.items():  # all names of a tied one
        if id(tensor) in smaller:
            owner, _, attribute = name.rpartition(".")
            value = smaller[id(tensor)]
            if isinstance(tensor, nn.Parameter) and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, tensor.requires_grad)
                smaller[id(tensor)] = value
            setattr(module.get_submodule(owner), attribute, value)
    for layer, shapes in reversed(before):  # parts first
        correct_sizes(layer, shapes)
    for name, size in plan.items():
        if isinstance(size, int):
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, size)


def check_plan(plan: Plan, module: nn.Module) -> None:
    """Raise ``ValueError`` unless a plan fits a module."""
    shapes = {name: tensor.shape for name, tensor in _tensors(module)}
    layers = dict(module.named_modules(remove_duplicate=False))
    for name, dims in plan.items():
        if isinstance(dims, int):
            owner, _, attribute = name.rpartition(".")
            held = vars(layers[owner]).get(attribute) if owner in layers else None
            if type(held) is not int or not 1 <= dims <= held:
                raise ValueError(
                    f"the plan sets {name!a} to {dims}, where the module holds {held!a}: "
                    "it can only make an attribute smaller that is a number"
                )
            continue
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
    plain = {
        n: dims if isinstance(dims, int) else {str(d): list(kept) for d, kept in dims.items()}
        for n, dims in plan.items()
    }
    return dump_json(plain).decode()


def plan_from_json(text: str) -> dict[str, dict[int, list[int]] | int]:
    """The plan that :func:`plan_to_json` wrote.

    Raises:
        PackedFileError: If the text is none.
    """
    plan: dict[str, dict[int, list[int]] | int] = {}
    for name, dims in require_object(load_json(text.encode(), "the plan"), "the plan").items():
        if isinstance(dims, int):
            plan[name] = require_count(dims, f"the attribute {name!a}", MAX_NUMEL)
            continue
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


def plan_from_text(text: str) -> dict[str, dict[int, list[int]] | int]:
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
