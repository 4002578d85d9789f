"""What becomes a teacher: a frozen copy, or a guest for the length of a fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

_REGISTRIES = {"_parameters", "_buffers", "_modules", "_trainer"}


def frozen_copy(module: nn.Module) -> nn.Module:
    """A deep copy in evaluation mode, without gradients; of a compiled module, the eager one.

    What cannot be copied, a lock or an open file, is shared, with a warning. Of tensors that hooks
    compute (weight norm, masks of ``torch.nn.utils.prune``) the values are copied.

    Raises:
        ValueError: If the module cannot be copied all the same.
    """
    # `torch.compile(lightning_module)` has put compiled methods of the original on the instance.
    compiled: Mapping[str, Any] = getattr(module, "_compiler_ctx", None) or {}
    memo: dict[int, Any] = {id(compiled): {}}
    for owner in module.modules():
        for value in vars(owner).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        twin = copy.deepcopy(module, dict(memo))
    except Exception:  # whatever the class of a stranger's attribute raises
        memo |= _uncopyable(module, known=set(memo))
        try:
            twin = copy.deepcopy(module, memo)
        except Exception as error:
            raise ValueError(
                f"Distillation cannot copy {type(module).__name__} ({error}): give it a teacher"
            ) from error
    for part in twin.modules():
        vars(part).pop("_compiled_call_impl", None)
    for name in compiled:
        vars(twin).pop(name.removeprefix("original_"), None)
    if compiled:
        vars(twin)["_compiler_ctx"] = None
    return twin.eval().requires_grad_(False)


def _uncopyable(module: nn.Module, known: set[int]) -> dict[int, Any]:
    """The other attributes of a module and its parts that no copy can be made of, by identity."""
    modules = {id(m): m for m in module.modules()}
    found, names = {}, []
    for path, owner in module.named_modules():
        for name, value in vars(owner).items():
            if name in _REGISTRIES or id(value) in known:
                continue
            try:
                copy.deepcopy(value, dict(modules))
            except Exception:
                found[id(value)] = value
                names.append(f"{path}.{name}".lstrip("."))
    rank_zero_warn(f"Distillation's teacher shares what cannot be copied with the module: {names}")
    return found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; unlike a state dict always all of them, and nothing else."""
    return {n: p.detach() for n, p in (*module.named_parameters(), *module.named_buffers())}


@torch.no_grad()
def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite what :func:`tensors_of` gives.

    Raises:
        ValueError: If names or shapes differ.
    """
    own = tensors_of(module)
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
        raise ValueError(
            f"the teacher in the checkpoint does not fit {type(module).__name__}: it was copied "
            "from another module or layer"
        )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


class Guest:
    """A module in evaluation mode on another device for a while.

    Args:
        module: The module.
        device: Where it is needed.
        home: Where it goes afterwards; ``None`` is where it came from.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, home: torch.device | None = None
    ) -> None:
        self._module = module
        self._modes = {part: part.training for part in module.modules()}
        here = next((t.device for t in tensors_of(module).values()), device)
        self._home = here if home is None else home
        module.eval().to(device)

    def leave(self) -> None:
        """Go home, and restore the modes."""
        self._module.to(self._home)
        for part, mode in self._modes.items():
            part.training = mode
