"""θ as tensors and names, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_condensa.schemes import Encoded, Encoding
from lightning_condensa.schemes.combined import combined


def encoded_state(encoding: Encoding) -> dict[str, Any]:
    """One encoding: its shape, and the leaves of each term."""
    terms = [[_leaf_state(leaf) for leaf in term] for term in encoding.terms]
    return {"shape": list(encoding.shape), "terms": terms}


def encoded_from_state(state: Mapping[str, Any], device: torch.device) -> Encoding:
    """The encoding that :func:`encoded_state` described."""
    terms = tuple(tuple(_leaf(leaf, device) for leaf in term) for term in state["terms"])
    return combined(terms, state["shape"])


def _leaf_state(leaf: Encoded) -> dict[str, Any]:
    return {
        "codes": leaf.codes,
        "dtype": str(leaf.dtype).removeprefix("torch."),
        "scale": leaf.scale,
        "mask": leaf.mask,
        "group": leaf.group,
        "bits": leaf.bits,
        "table_bits": leaf.table_bits,
    }


def _leaf(state: Mapping[str, Any], device: torch.device) -> Encoded:
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
