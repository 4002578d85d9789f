"""Checkpoints of parameters that are sharded over processes (FSDP2, tensor parallelism)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_condensa.functional.placement import placed, whole


def gathered(state: Any) -> Any:
    """A state with whole tensors for DTensors, as what writes a checkpoint needs it.

    A collective call. The whole tensors are on the CPU of the first process, which is the one that
    writes; they are taken there one by one, and the other processes get ``None``.

    Args:
        state: Tensors and anything else in dicts and lists.
    """

    def take(tensor: DTensor) -> Tensor | None:
        full = whole(tensor)
        return full.cpu() if dist.get_rank() == 0 else None

    return apply_to_collection(state, DTensor, take)


def placed_like(
    tensors: Mapping[str, Tensor], references: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Whole tensors, sharded as those of the same names are.

    Args:
        tensors: By name; those without a reference stay as they are.
        references: How each is placed.
    """
    return {n: placed(t, references[n]) if n in references else t for n, t in tensors.items()}
