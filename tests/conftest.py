"""Small networks, data and trainers that the tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

# Processes that tests start import helpers by name, too.
sys.path.insert(0, str(Path(__file__).parent))

# Small tensors: more threads would only wait for each other, and for those of other workers.
torch.set_num_threads(1)

# Drawing examples takes long on a busy machine, which says nothing about the package.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

FEATURES, CLASSES = 8, 3
BATCH, BATCHES = 16, 6

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-2),
}


class TinyNet(pl.LightningModule):
    """Linear, batch norm, ReLU, Linear: 176 weights, 19 biases."""

    weights = 8 * 16 + 16 * 3

    def __init__(self, optimizer: str = "sgd", scheduler: bool = False) -> None:
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", functional.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_density", density_of(self))

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        if not self.scheduler:
            return optimizer
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def density_of(module: nn.Module) -> float:
    """Share of non-zeros in the weights of two or more dimensions."""
    weights = [p for p in module.parameters() if p.dim() > 1]
    return sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def net_class() -> type[TinyNet]:
    """The small network, to be subclassed."""
    return TinyNet


@pytest.fixture(scope="session")
def net() -> Callable[..., TinyNet]:
    """Builds the small network, every time with the same weights."""

    def build(*args: Any, cls: type[TinyNet] = TinyNet, **kwargs: Any) -> TinyNet:
        torch.manual_seed(0)
        return cls(*args, **kwargs)

    return build


@pytest.fixture(scope="session")
def batches() -> list[tuple[Tensor, Tensor]]:
    """Six batches of 16 with labels that a small network can learn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * BATCHES, FEATURES, generator=generator)
    y = (x[:, :CLASSES] + 0.5 * x[:, 3:6] * x[:, 4:7]).argmax(1)
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


@pytest.fixture(scope="session")
def loader(batches: list[tuple[Tensor, Tensor]]) -> DataLoader[Any]:
    """The batches, unshuffled."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Builds quiet CPU trainers."""

    def build(*callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": tmp_path,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(
                isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks
            ),
            "logger": False,
            "callbacks": list(callbacks),
        }
        return pl.Trainer(**(defaults | kwargs))

    return build


@pytest.fixture(scope="session")
def density() -> Callable[[nn.Module], float]:
    """Share of non-zeros in a module's weight matrices."""
    return density_of
