"""Scores of single samples, collected while Lightning validates or tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_condensa.deploy.atomic import write_atomically
from lightning_condensa.functional.paired import is_binary, sample_scores

#: From what a validation step returned and its batch to a score per sample, whose mean is the
#: metric.
PerSample = Callable[[Any, Any], Tensor]

SCORES_FILE = "scores.safetensors"
#: Numbers of a sample that its checksum looks at, about.
_FEATURES = 64
_TARGETS = ("target", "targets", "label", "labels", "y")
_PREDICTIONS = ("logits", "preds")


@dataclass(frozen=True)
class Scores:
    """A score per sample, whose mean is the metric; or why there is none.

    Attributes:
        values: Shape ``[n]``; empty where there is none.
        batches: A checksum of each batch's tensors, to tell whether two models saw the same.
        kind: What the scores are, such as ``"accuracy"``.
        reason: Why there is none.
    """

    values: Tensor
    batches: Tensor
    kind: str = ""
    reason: str = ""

    @classmethod
    def none(cls, reason: str) -> Scores:
        """No scores, for a reason."""
        return cls(torch.empty(0), torch.empty(0, dtype=torch.float64), reason=reason)

    def save(self, path: Path) -> None:
        """Write a safetensors file; right and wrong answers take a byte each."""
        values = self.values.to(torch.uint8) if is_binary(self.values) else self.values
        tensors = {"values": values.contiguous(), "batches": self.batches}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(tensors, {"kind": self.kind, "reason": self.reason}))

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote; without the file, no scores."""
        if not path.exists():
            return cls.none(f"there is no {path}")
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            values, batches = file.get_tensor("values"), file.get_tensor("batches")
        return cls(values.float(), batches, facts["kind"], facts["reason"])


def scores_of(
    outputs: Any, batch: Any, called: list[Any], metric: str, per_sample: PerSample | None
) -> dict[str, Tensor]:
    """Scores of a batch's samples, of which one may have the metric for its mean.

    Args:
        outputs: What the validation step returned.
        batch: The batch.
        called: What the module returned when it was first called; empty where it was not.
        metric: The metric's name.
        per_sample: The user's own way.

    Returns:
        Name → scores ``[n]``; empty where none can be had.

    Raises:
        ValueError: If ``per_sample`` returns something else.
    """
    if per_sample is not None:
        values = per_sample(outputs, batch)
        if not isinstance(values, Tensor) or values.ndim != 1:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"per_sample must return a tensor of shape [n], got {got}")
        return {"per_sample": values}
    given = outputs if isinstance(outputs, Mapping) else {}
    own = given.get(metric)
    if isinstance(own, Tensor) and own.ndim == 1:
        return {metric: own}
    prediction = _first(given, _PREDICTIONS)
    if prediction is None and called:
        prediction = _prediction(called[0])
    target = _first(given, _TARGETS)
    target = _target(batch) if target is None else target
    if prediction is None or target is None or isinstance(prediction, DTensor):
        return {}
    return sample_scores(prediction, target.to(prediction.device))


def _first(given: Any, names: tuple[str, ...]) -> Tensor | None:
    if not isinstance(given, Mapping):
        return None
    return next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)


def _prediction(output: Any) -> Tensor | None:
    if isinstance(output, list | tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else _first(output, _PREDICTIONS)


def _target(batch: Any) -> Tensor | None:
    if isinstance(batch, list | tuple) and len(batch) > 1:
        return batch[-1] if isinstance(batch[-1], Tensor) else None
    return _first(batch, _TARGETS)


def checksum(batch: Any) -> Tensor | None:
    """A number that another batch, or this one in another order, would not have."""
    sums: list[Tensor] = []

    def add(tensor: Tensor) -> None:
        if tensor.layout != torch.strided or tensor.is_complex() or isinstance(tensor, DTensor):
            return
        flat = tensor.detach().reshape(len(tensor) if tensor.ndim else 1, -1)
        some = flat[:, :: max(1, flat.shape[1] // _FEATURES)]  # images are long
        rows = some.cpu().double().nan_to_num().sum(1)
        weights = torch.arange(1, len(rows) + 1, dtype=torch.float64)
        sums.append((len(sums) + 1) * (rows @ weights))

    apply_to_collection(batch, Tensor, add)
    return torch.stack(sums).sum() if sums else None
