"""Handwritten digits: the small network and data that the examples and benchmarks compress.

scikit-learn ships 1,797 grey images of 8 x 8 pixels, so nothing is downloaded and a dense
network trains in seconds on one core.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

CLASSES = 10


class DigitsCNN(pl.LightningModule):
    """Two convolutions and two linear layers: 151,306 weights (151,072 without the biases).

    Args:
        lr: Learning rate at the start; one cosine over the whole run takes it to zero.
        momentum: Nesterov momentum of the SGD.
        weight_decay: L2 penalty of the SGD.
        label_smoothing: Share of each training label spread over all classes.

    Example:
        >>> logits = DigitsCNN()(torch.zeros(2, 1, 8, 8))
        >>> logits.shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 128),
            nn.ReLU(),
            nn.Linear(128, CLASSES),
        )
        self.val_acc = MulticlassAccuracy(CLASSES, average="micro")
        self.test_acc = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``(batch, 10)`` for images of shape ``(batch, 1, 8, 8)``."""
        logits: Tensor = self.layers(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the loss, and the logits for callbacks such as distillation."""
        x, y = batch
        logits = self(x)
        loss = functional.cross_entropy(logits, y, label_smoothing=self.hparams["label_smoothing"])
        self.log("train_loss", loss)
        return {"loss": loss, "logits": logits}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_acc``."""
        x, y = batch
        logits = self(x)
        self.val_acc(logits, y)
        self.log("val_loss", functional.cross_entropy(logits, y))
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_acc``."""
        x, y = batch
        self.test_acc(self(x), y)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return SGD with Nesterov momentum under one cosine decay, stepped every batch."""
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.hparams["lr"],
            momentum=self.hparams["momentum"],
            weight_decay=self.hparams["weight_decay"],
            nesterov=True,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class DigitsData(pl.LightningDataModule):
    """scikit-learn's digits in memory: 1,024 training, 373 validation and 400 test images.

    The split is stratified by class. 1,024 images are 16 whole batches of 64, so 96 epochs are
    1,536 optimizer steps; 373 validation images resolve steps of 0.27 points of accuracy.

    Training order depends on ``(seed, epoch)`` alone, so that a resumed run sees the batches
    that an uninterrupted one would have seen.

    Args:
        batch_size: Training images per batch and device; the last, short batch is dropped.
        seed: Shuffles the training images.
        split_seed: Chooses which images are for training, validation and test.

    Example:
        >>> data = DigitsData()
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([64, 1, 8, 8]), torch.Size([64]))
    """

    def __init__(self, batch_size: int = 64, seed: int = 0, split_seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.split_seed = split_seed

    def setup(self, stage: str | None = None) -> None:
        """Load the images, scale them to [0, 1] and split them; cheap, so for every stage."""
        pixels, labels = load_digits(return_X_y=True)
        x = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        y = torch.tensor(labels)
        rest, test = train_test_split(
            range(len(y)), test_size=400, stratify=y, random_state=self.split_seed
        )
        train, val = train_test_split(
            rest, test_size=373, stratify=y[rest], random_state=self.split_seed
        )
        self.train = TensorDataset(x[train], y[train])
        self.val = TensorDataset(x[val], y[val])
        self.test = TensorDataset(x[test], y[test])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return shuffled batches; Lightning tells the sampler which epoch it is."""
        sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
            self.train,
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
            seed=10_000 * self.seed,  # the sampler adds the epoch: keep the seeds' orders apart
        )
        return DataLoader(self.train, self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation images in order."""
        return DataLoader(self.val, batch_size=512)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test images in order."""
        return DataLoader(self.test, batch_size=512)


def train_dense(seed: int = 0, max_epochs: int = 30, lr: float = 0.05) -> DigitsCNN:
    """Train an uncompressed network, the usual starting point of a compression.

    Args:
        seed: Fixes the initial weights and the order of the training images.
        max_epochs: Passes over the training images, 16 optimizer steps each.
        lr: Learning rate at the start.

    Returns:
        The trained network, in evaluation mode.
    """
    pl.seed_everything(seed, verbose=False)
    model = DigitsCNN(lr=lr)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=DigitsData(seed=seed))
    return model.eval()
