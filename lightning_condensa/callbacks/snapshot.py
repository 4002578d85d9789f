"""The best compressed model of a run, by a logged metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_condensa.lc.lagrangian import encoded_from_state, encoded_state
from lightning_condensa.schemes import Encoded


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
    theta: dict[str, Encoded]
    rest: dict[str, Tensor]

    @classmethod
    def take(
        cls, score: float, step: int, theta: Mapping[str, Encoded], module: nn.Module
    ) -> Snapshot:
        """Copy θ and the rest of the module, as ordinary tensors on the CPU."""
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
        """Plain tensors and numbers."""
        theta = {n: encoded_state(e) for n, e in self.theta.items()}
        return {"score": self.score, "step": self.step, "theta": theta, "rest": self.rest}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Snapshot:
        """The snapshot that :meth:`state_dict` described."""
        cpu = torch.device("cpu")
        theta = {n: encoded_from_state(e, cpu) for n, e in state["theta"].items()}
        return cls(state["score"], state["step"], theta, dict(state["rest"]))
