"""What `lc_overhead.py` trains: networks, batches and optimizers, in plain torch.

Nothing here needs Lightning or this package, so that `reference_steps.py` runs in an environment
that has only torch and the reference package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from block_clock import now
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: Share of the weights that is kept.
DENSITY = 0.05


def digits(width: int) -> nn.Sequential:
    """The network of the demo: two convolutions and two linear layers, for 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, 10),
    )


def convolutions(width: int) -> nn.Sequential:
    """Ten 3 x 3 convolutions in the shape of a VGG, for images of 32 x 32 pixels."""
    layers: list[nn.Module] = []
    channels = 3
    for factor in (1, 2, 4, 8, 8):
        for _ in range(2):
            layers += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.ReLU()]
            channels = factor * width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def fully_connected(width: int) -> nn.Sequential:
    """Four square layers: the least arithmetic per weight that a batch allows."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))


Network = Literal["digits", "convolutions", "fully connected"]
NETWORKS: dict[Network, Callable[[int], nn.Sequential]] = {
    "digits": digits,
    "convolutions": convolutions,
    "fully connected": fully_connected,
}


@dataclass(frozen=True)
class Case:
    """One network in training.

    Attributes:
        network: Key of `NETWORKS`.
        weights: How many it has, about.
        width: That gives this many.
        batch: Samples in a batch.
        optimizer: ``"SGD"`` with momentum or ``"AdamW"``.
    """

    network: Network
    weights: str
    width: int
    batch: int
    optimizer: Literal["SGD", "AdamW"] = "SGD"

    @property
    def title(self) -> str:
        """The case in a line."""
        return f"{self.network}, batch {self.batch:,}, {self.weights} weights, {self.optimizer}"

    def net(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The network, the same at each call."""
        torch.manual_seed(0)
        return NETWORKS[self.network](self.width).to(device, dtype)

    def inputs(self, device: str, dtype: torch.dtype) -> Tensor:
        """The batch of every step."""
        shapes: dict[Network, tuple[int, ...]] = {
            "digits": (1, 8, 8),
            "convolutions": (3, 32, 32),
            "fully connected": (self.width,),
        }
        torch.manual_seed(1)
        return torch.randn(self.batch, *shapes[self.network]).to(device, dtype)

    def optimizer_for(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A new optimizer."""
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(parameters, lr=1e-4)
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True)


CASES: dict[str, tuple[Case, ...]] = {
    "cpu": (
        Case("digits", "0.15 M", 32, 8),
        Case("digits", "0.15 M", 32, 8, "AdamW"),
        Case("convolutions", "0.3 M", 12, 32),
        Case("convolutions", "4 M", 42, 32),
        Case("convolutions", "4 M", 42, 32, "AdamW"),
        Case("convolutions", "25 M", 104, 32),
        Case("fully connected", "0.3 M", 270, 128),
        Case("fully connected", "4 M", 1000, 128),
        Case("fully connected", "4 M", 1000, 128, "AdamW"),
        Case("fully connected", "25 M", 2500, 128),
        Case("fully connected", "0.3 M", 270, 1024),
        Case("fully connected", "4 M", 1000, 1024),
        Case("fully connected", "25 M", 2500, 1024),
    ),
    # Multiples of 8, which tensor cores want.
    "cuda": (
        Case("convolutions", "25 M", 104, 256),
        Case("convolutions", "300 M", 360, 256),
        Case("fully connected", "25 M", 2496, 4096),
        Case("fully connected", "300 M", 8640, 4096),
        Case("fully connected", "300 M", 8640, 4096, "AdamW"),
    ),
}


def loss_of(outputs: Tensor) -> Tensor:
    """A loss that needs every output."""
    return outputs.square().mean()


def plain_seconds(case: Case, device: str, dtype: torch.dtype) -> float:
    """A step's time, roughly, to plan a measurement by."""
    net, inputs = case.net(device, dtype), case.inputs(device, dtype)
    optimizer = case.optimizer_for(net.parameters())
    times = []
    for _ in range(3):
        started = now(device)
        optimizer.zero_grad()
        loss_of(net(inputs)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        times.append(now(device) - started)
    return min(times)
