"""A packed file into a module, without a second copy of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Size, Tensor, nn
from torch.autograd.graph import increment_version

from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.packed import (
    DEFAULT_MAX_BYTES,
    naming,
    open_packed,
    within_memory,
)
from lightning_condensa.deploy.plan import Plan, apply_plan, check_plan, cuts_of, plan_from_text
from lightning_condensa.deploy.stored_tensor import StoredTensor, decoded

M = TypeVar("M", bound=nn.Module)

#: Key of the shrink plan in a file's metadata.
SHRINK_PLAN = "shrink_plan"


def load_compressed(path: str | Path, module: M, *, max_bytes: int = DEFAULT_MAX_BYTES) -> M:
    """Load a packed file into a module of the class it was made from; outputs are the same.

    Weights are decoded straight into the module's memory. A module on the meta device
    (``with torch.device("meta"): module = Net()``) gets new memory, on the CPU: no weight is ever
    initialized. Where the file holds a model that :meth:`CompressedModel.shrink` made smaller, the
    module is made as small.

    Args:
        path: A file that :meth:`CompressedModel.save` wrote.
        module: A module with the same parameters and buffers, compiled or not; overwritten in
            place.
        max_bytes: Memory that decoding the file may take, and the most that it may have.

    Returns:
        The module.

    Raises:
        PackedFileError: If the file is damaged, belongs to another module, or takes more memory;
            the module is then as it was.
        ValueError: If the module is on the meta device and has buffers there that no state dict
            holds, so that they would stay without values.
    """
    reader = open_packed(path, max_bytes=max_bytes)
    shapes = {entry.name: Size(entry.shape) for entry in reader.spec.entries}
    aliases = reader.spec.aliases
    shapes |= {alias: shapes[name] for alias, name in aliases.items()}
    _check_has_values(module)
    with naming(path), within_memory():
        text = reader.metadata.get(SHRINK_PLAN)
        plan = {} if text is None else plan_from_text(text)
        # Before anything of the module changes: what follows can't find the file damaged.
        tensors = reader.tensors(max_bytes=max_bytes)
    _match(module, plan, shapes, path)
    own = module.state_dict(keep_vars=True)
    keys = {eager_name(key): key for key in own}
    # Only then can tensors be overwritten that were made so, and only they can't be otherwise.
    inference = any(isinstance(t, Tensor) and t.is_inference() for t in own.values())
    with within_memory(), torch.inference_mode(inference), torch.no_grad():
        state = {name: _filled(own[keys[name]], tensor) for name, tensor in tensors.items()}
        for alias, name in aliases.items():
            tied = own[keys[alias]] is own[keys[name]]
            state[alias] = state[name] if tied else _filled(own[keys[alias]], tensors[name])
        # Hooks of the module see an ordinary state dict. Parameters that hold their values already
        # are copied onto themselves, which costs nothing.
        meta = any(isinstance(t, Tensor) and t.is_meta for t in own.values())
        module.load_state_dict({keys[name]: v for name, v in state.items()}, assign=meta)
    return module


def eager_name(name: str) -> str:
    """The name that a tensor has where ``torch.compile`` wraps no part of the module."""
    return name.replace("_orig_mod.", "")


def _filled(own: object, tensor: StoredTensor) -> Tensor:
    """An entry of a module's state dict with its new values: itself wherever that can be."""
    plain = type(own) in (Tensor, nn.Parameter)
    if not isinstance(own, Tensor) or not plain or own.layout != torch.strided:
        return decoded(tensor)
    if own.is_meta:
        with torch.inference_mode(False):
            value = decoded(tensor).to(own.dtype)
            return nn.Parameter(value, own.requires_grad) if type(own) is nn.Parameter else value
    if own.device.type == "cpu" and own.dtype == tensor.dtype and own.is_contiguous():
        tensor.write(own.detach())
        if not own.is_inference():
            increment_version(own)
    else:
        own.copy_(decoded(tensor))
    return own


def _check_has_values(module: nn.Module) -> None:
    """Raise where a buffer would stay on the meta device."""
    stored = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    buffers = module.named_buffers()
    left = [name for name, buffer in buffers if buffer.is_meta and id(buffer) not in stored]
    if left:
        raise ValueError(
            f"module must not have buffers on the meta device that its state dict leaves out: "
            f"no file holds values for {', '.join(left[:5])}"
        )


def _match(module: nn.Module, plan: Plan, shapes: Mapping[str, Size], path: str | Path) -> None:
    """Make a module of the full size as small as one in a file.

    Raises:
        PackedFileError: If the module is another one than that in the file; it is then as it was.
    """
    states = module.state_dict().items()
    own: dict[str, Any] = {eager_name(key): getattr(v, "shape", None) for key, v in states}
    cuts = cuts_of(plan)
    smaller = all(own.get(name) == shapes.get(name) for name in cuts)
    changes = {} if smaller else _named(module, plan)
    try:
        check_plan(changes, module)
    except ValueError as error:
        raise _other(module, path, str(error)) from error
    for name, dims in () if smaller else cuts.items():
        own[name] = Size(len(dims.get(d, range(n))) for d, n in enumerate(own[name]))
    differences = {
        "missing from the file": sorted(set(own) - set(shapes)),
        "only in the file": sorted(set(shapes) - set(own)),
        "of another shape": sorted(n for n in set(own) & set(shapes) if own[n] != shapes[n]),
    }
    listed = "; ".join(f"{k}: {', '.join(v[:5])}" for k, v in differences.items() if v)
    if listed:
        raise _other(module, path, listed)
    apply_plan(module, changes)


def _named(module: nn.Module, plan: Plan) -> Plan:
    """A plan in the names of a module of which parts may be compiled."""
    names = {eager_name(key): key for key in module.state_dict()}
    owners = {eager_name(f"{path}."): f"{path}." for path, _ in module.named_modules() if path}
    for name in plan.keys() - cuts_of(plan).keys():  # attributes
        owner, dot, attribute = name.rpartition(".")
        names[name] = owners.get(owner + dot, owner + dot) + attribute
    return {names.get(name, name): change for name, change in plan.items()}


def _other(module: nn.Module, path: str | Path, why: str) -> PackedFileError:
    return PackedFileError(f"{path} belongs to another module than {type(module).__name__}: {why}")
