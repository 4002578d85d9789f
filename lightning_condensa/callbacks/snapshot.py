"""The best compressed model of a run, by a logged metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_condensa.callbacks.sharded import placed_like
from lightning_condensa.callbacks.teacher import tensors_of
from lightning_condensa.lc.states import encoded_from_state, encoded_state
from lightning_condensa.schemes import Encoding


@dataclass(frozen=True)
class Snapshot:
    """θ with everything else that its score depends on.

    Attributes:
        score: The monitored metric.
        step: Optimizer step at which it was taken.
        theta: Encodings by parameter name.
        rest: The other entries of the module's state dict.
    """

    score: float
    step: int
    theta: dict[str, Encoding]
    rest: dict[str, Tensor]

    @classmethod
    def take(
        cls, score: float, step: int, theta: Mapping[str, Encoding], module: nn.Module
    ) -> Snapshot:
        """Copy θ and the rest of the module to the CPU; what is sharded stays so."""
        with torch.inference_mode(False), torch.no_grad():
            cpu = torch.device("cpu")
            encoded = {n: encoded_from_state(encoded_state(e), cpu) for n, e in theta.items()}
            rest = {
                name: value.detach().to(cpu, copy=True)
                for name, value in module.state_dict().items()
                if name not in theta and isinstance(value, Tensor)
            }
        return cls(score, step, encoded, rest)

    def beats(self, score: float, mode: Literal["min", "max"]) -> bool:
        """Whether this snapshot is at least as good as ``score``."""
        return self.score > score if mode == "max" else self.score < score

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        theta = {n: encoded_state(e) for n, e in self.theta.items()}
        return {"score": self.score, "step": self.step, "theta": theta, "rest": self.rest}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], module: nn.Module) -> Snapshot:
        """The snapshot that :meth:`state_dict` described, sharded as ``module`` is."""
        cpu, own = torch.device("cpu"), tensors_of(module)
        theta = {n: encoded_from_state(e, cpu).placed(own[n]) for n, e in state["theta"].items()}
        return cls(state["score"], state["step"], theta, placed_like(state["rest"], own))


def measured(trainer: pl.Trainer, monitor: str) -> float:
    """The value of a logged metric, the mean over all ranks, so that they agree on the best θ.

    Raises:
        ValueError: If the module does not log it.
    """
    if monitor not in trainer.callback_metrics:
        raise ValueError(
            f"monitor={monitor!r} is not logged by the module; "
            f"it logs {sorted(trainer.callback_metrics)}"
        )
    score = trainer.callback_metrics[monitor].clone()  # the reduction is in place
    return float(trainer.strategy.reduce(score, reduce_op="mean"))
