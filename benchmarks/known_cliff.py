"""A search whose trials take as long as they are told, to measure what it costs beyond them."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_condensa import CondensaSearch, MemoryFootprint, Prune, Range


class KnownCliff(pl.LightningModule):
    """One layer, whose accuracy follows from its density, with noise from the trial's seed.

    Args:
        seconds: How long a fit sleeps.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(100, 40, bias=False)
        self.seconds, self.noise = seconds, 0.0

    def on_fit_start(self) -> None:
        """Draw the noise, and sleep."""
        self.noise = 0.002 * float(torch.randn(()))
        time.sleep(self.seconds)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Hardly move the weights."""
        loss: Tensor = self.layer(batch[0]).square().mean() * 1e-6
        return loss

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        """Log the known accuracy: it falls off at density 0.05."""
        density = float(torch.count_nonzero(self.layer.weight)) / self.layer.weight.numel()
        drop = 0.5 * min(max(math.log(0.05 / density), 0.0), 1.0)
        self.log("val_acc", 0.95 - drop + self.noise)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def start(seconds: float) -> tuple[KnownCliff, dict[str, Any]]:
    """The module and its loaders, the same every time."""
    torch.manual_seed(0)
    module = KnownCliff(seconds)
    data = TensorDataset(torch.randn(1000, 100))
    return module, {
        "train_dataloaders": DataLoader(TensorDataset(data.tensors[0][:32]), batch_size=8),
        "val_dataloaders": DataLoader(data, batch_size=500),
    }


def search(directory: Path, **changes: Any) -> CondensaSearch:
    """The search, in ``directory``."""
    arguments: dict[str, Any] = {
        "scheme": Prune(Range(0.005, 1.0, log=True)),
        "objective": MemoryFootprint(),
        "metric": "val_acc",
        "tolerance": 0.05,
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
        "dirpath": directory,
        "progress": False,
    }
    return CondensaSearch(**{**arguments, **changes})
