"""Small modules of every kind of layer."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from lightning_condensa.schemes import Encoded, Scheme


class Tied(nn.Module):
    """Two layers that share a weight, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()))


LAYERS = {
    "linear": lambda: nn.Linear(8, 12),
    "conv1d": lambda: nn.Conv1d(8, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3),
    "conv3d": lambda: nn.Conv3d(4, 6, 2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "transposed1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "transposed3d": lambda: nn.ConvTranspose3d(4, 6, 2, groups=2),
    "lstm": lambda: nn.LSTM(4, 5, num_layers=2),
    "gru cell": lambda: nn.GRUCell(4, 5),
    "attention": lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
    "tied": Tied,
}


def linears(*widths: int) -> nn.Sequential:
    """Linear layers in a row; parameters ``0.weight``, ``1.weight``, …"""
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with normally distributed parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def pi(scheme: Scheme, module: nn.Module) -> dict[str, Encoded]:
    """Π of a module's parameters."""
    return scheme.bind(module).pi(dict(module.named_parameters()))
