"""θ as tensors and names, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_condensa.schemes import Encoded


def encoded_state(encoded: Encoded) -> dict[str, Any]:
    """One encoding."""
    return {
        "codes": encoded.codes,
        "dtype": str(encoded.dtype).removeprefix("torch."),
        "scale": encoded.scale,
        "mask": encoded.mask,
        "group": encoded.group,
        "bits": encoded.bits,
        "table_bits": encoded.table_bits,
    }


def encoded_from_state(state: Mapping[str, Any], device: torch.device) -> Encoded:
    """The encoding that :func:`encoded_state` described."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device).clone()

    return Encoded(
        codes=state["codes"].to(device).clone(),
        dtype=getattr(torch, state["dtype"]),
        scale=moved(state["scale"]),
        mask=moved(state["mask"]),
        group=state["group"],
        bits=state["bits"],
        table_bits=state["table_bits"],
    )
