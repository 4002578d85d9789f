"""A module whose metric is a known function of its density: searches in milliseconds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_condensa import CondensaSearch, MemoryFootprint, Prune, Range

#: Densities below this one lose accuracy quickly.
CLIFF = 0.05


class Toy(pl.LightningModule):
    """One layer; ``val_acc`` falls off a cliff at density 0.05, and ``val_loss`` rises there.

    Args:
        trap: What happens in training when the density is below 0.5: ``"nan"`` or ``"raise"``.
        journal: A file that gets a line for every fit.
    """

    def __init__(self, trap: str = "", journal: Path | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(100, 40, bias=False)
        self.trap, self.journal = trap, journal

    def _density(self) -> float:
        return float(torch.count_nonzero(self.layer.weight)) / self.layer.weight.numel()

    def on_fit_start(self) -> None:
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write("fit\n")

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch[0]).square().mean() * 1e-6
        scheme = next(c.scheme for c in self.trainer.callbacks if hasattr(c, "scheme"))
        if self.trap and scheme.density < 0.5:
            if self.trap == "raise":
                raise RuntimeError("the toy was told to break")
            if self.trap == "nan":
                loss = loss * math.nan
        return loss

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        drop = 0.5 * min(max(math.log(CLIFF / self._density()), 0.0), 1.0)
        self.log_dict({"val_acc": 0.95 - drop, "val_loss": 0.1 + drop})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def loaders() -> dict[str, Any]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(1000, 100))
    return {
        "train_dataloaders": DataLoader(TensorDataset(data.tensors[0][:32]), batch_size=8),
        "val_dataloaders": DataLoader(data, batch_size=500),
    }


def toy(**arguments: Any) -> Toy:
    torch.manual_seed(0)
    return Toy(**arguments)


def search(directory: Path, **changes: Any) -> CondensaSearch:
    arguments: dict[str, Any] = {
        "scheme": Prune(Range(0.005, 1.0, log=True)),
        "objective": MemoryFootprint(),
        "metric": "val_acc",
        "tolerance": 0.05,
        "max_trials": 6,
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
        "dirpath": directory,
        "progress": False,
    }
    return CondensaSearch(**{**arguments, **changes})
