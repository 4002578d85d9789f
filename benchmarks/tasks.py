"""The tasks of the accuracy study: network, data, optimizer, and how θ is measured.

CIFAR-10 and Tiny Shakespeare are read from a folder given on the command line
(``cifar10/{train,test}.parquet`` in the Hugging Face layout, ``tinyshakespeare/input.txt``).
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from networks import CharLSTM, PatchTransformer, resnet8, vgg
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"
sys.path.insert(0, str(EXAMPLE))

from model import DigitsCNN, DigitsData  # noqa: E402

SCRATCH = Path(tempfile.gettempdir()) / "lightning-condensa-benchmarks"
WINDOW = 48  # characters in a training sequence


@dataclass(frozen=True)
class Splits:
    """Inputs and labels to train on, to choose by, and to report."""

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset


@dataclass(frozen=True)
class Task:
    """A network to compress, and everything that a fair comparison holds fixed.

    Attributes:
        name: In result files.
        network: Builds the network, not trained.
        splits: Loads the data; the argument is the data folder.
        densities: To compress to.
        optimizer: Of dense training and of every method that leaves it to the user.
        lr: Learning rate at the start; a cosine takes it to zero.
        weight_decay: L2 penalty (SGD) or decoupled (AdamW).
        batch_size: Of every method.
        dense_epochs: Epochs of dense training.
        epochs: Epochs of compression at budget S, about 1,500 steps.
        metric: ``"acc"`` in percent, or ``"bpc"``, bits per character.
        label_smoothing: Of the training loss.
        augment: Whether images are shifted and mirrored at random.
    """

    name: str
    network: Callable[[], nn.Module]
    splits: Callable[[Path | None], Splits]
    densities: tuple[float, ...]
    optimizer: Literal["sgd", "adamw"]
    lr: float
    weight_decay: float
    batch_size: int
    dense_epochs: int
    epochs: int
    metric: Literal["acc", "bpc"] = "acc"
    label_smoothing: float = 0.0
    augment: bool = False

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether more or less of the metric is better."""
        return "max" if self.metric == "acc" else "min"

    def optimizer_for(self, parameters: Any) -> torch.optim.Optimizer:
        """The task's optimizer over some parameters."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, self.lr, momentum=0.9, weight_decay=self.weight_decay, nesterov=True
            )
        return torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay)

    @torch.no_grad()
    def measure(self, network: nn.Module, data: TensorDataset) -> float:
        """The metric of a network on a split."""
        x, y = data.tensors
        network.eval()
        logits = torch.cat([network(part) for part in x.split(500)])
        if self.metric == "bpc":
            return float(functional.cross_entropy(logits, y.flatten())) / math.log(2)
        return 100 * float((logits.argmax(1) == y).float().mean())


class TaskModule(pl.LightningModule):
    """A task's network as a Lightning user would write it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.network = task.network()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the loss, and the logits for callbacks such as distillation."""
        x, y = batch
        logits = self(shifted_and_mirrored(x) if self.task.augment else x)
        loss = functional.cross_entropy(
            logits, y.flatten(), label_smoothing=self.task.label_smoothing
        )
        return {"loss": loss, "logits": logits}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_acc`` or ``val_bpc``."""
        x, y = batch
        logits, y = self(x), y.flatten()
        if self.task.metric == "acc":
            value = 100 * (logits.argmax(1) == y).float().mean()
        else:
            value = functional.cross_entropy(logits, y) / math.log(2)
        self.log(f"val_{self.task.metric}", value, batch_size=len(x))

    def configure_optimizers(self) -> Any:
        """Return the task's optimizer under one cosine decay, stepped every batch."""
        optimizer = self.task.optimizer_for(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class TaskData(pl.LightningDataModule):
    """A task's splits; the order of training depends on ``(seed, epoch)`` alone."""

    def __init__(self, task: Task, splits: Splits, seed: int) -> None:
        super().__init__()
        self.task = task
        self.splits = splits
        self.seed = seed

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return shuffled batches."""
        sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
            self.splits.train, num_replicas=1, rank=0, seed=10_000 * self.seed
        )
        return DataLoader(self.splits.train, self.task.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation data in order."""
        return DataLoader(self.splits.val, 500)


@dataclass(frozen=True)
class Start:
    """A dense network, its data and seed: where every method begins."""

    task: Task
    seed: int
    weights: dict[str, Tensor]
    splits: Splits

    def module(self) -> TaskModule:
        """Return a new copy of the dense network."""
        module = TaskModule(self.task)
        module.load_state_dict(self.weights)
        return module

    def data(self) -> TaskData:
        """Return the data in this seed's order."""
        return TaskData(self.task, self.splits, self.seed)


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def dense_start(task: Task, seed: int, folder: Path | None) -> Start:
    """Train the dense network of a seed, or read it from the scratch folder."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    sources = [Path(__file__), Path(__file__).with_name("networks.py"), EXAMPLE / "model.py"]
    text = b"".join(source.read_bytes() for source in sources) + torch.__version__.encode()
    path = SCRATCH / f"{task.name}-{seed}-{hashlib.sha256(text).hexdigest()[:12]}.safetensors"
    splits = task.splits(folder)
    if not path.exists():
        pl.seed_everything(seed, verbose=False)
        module = TaskModule(task)
        trainer = pl.Trainer(max_epochs=task.dense_epochs, limit_val_batches=0, **QUIET)
        trainer.fit(module, TaskData(task, splits, seed))
        _save({n: t.contiguous() for n, t in module.state_dict().items()}, path)
    return Start(task, seed, load_file(path), splits)


def shifted_and_mirrored(x: Tensor) -> Tensor:
    """Move a batch of images by up to 4 pixels and mirror every other one, at random."""
    padded = functional.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2,)).tolist()  # one shift for all: cheap
    moved = padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, moved.flip(3), moved)


def digits(folder: Path | None) -> Splits:
    """scikit-learn's digits, split as in the example."""
    data = DigitsData()
    data.setup()
    return Splits(data.train, data.val, data.test)


def cifar10(folder: Path | None) -> Splits:
    """10,000 CIFAR-10 images to train on, 2,000 to choose by, the 10,000 test images."""
    if folder is None:
        raise FileNotFoundError("CIFAR-10 needs --data, the folder that holds cifar10/")
    images, labels = _cifar_tensors(folder / "cifar10" / "train.parquet")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))

    def scaled(x: Tensor, y: Tensor) -> TensorDataset:
        return TensorDataset((x.float() / 255 - 0.47) / 0.25, y)

    train, val = order[:10_000], order[10_000:12_000]
    return Splits(
        scaled(images[train], labels[train]),
        scaled(images[val], labels[val]),
        scaled(*_cifar_tensors(folder / "cifar10" / "test.parquet")),
    )


def _cifar_tensors(path: Path) -> tuple[Tensor, Tensor]:
    cache = SCRATCH / f"cifar10-{path.stem}.safetensors"
    if not cache.exists():
        import numpy as np
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
        from PIL import Image

        rows = pq.read_table(path).to_pylist()
        images = np.stack([np.asarray(Image.open(io.BytesIO(r["img"]["bytes"]))) for r in rows])
        x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        SCRATCH.mkdir(parents=True, exist_ok=True)
        _save({"x": x, "y": torch.tensor([r["label"] for r in rows])}, cache)
    tensors = load_file(cache)
    return tensors["x"], tensors["y"]


def shakespeare(folder: Path | None) -> Splits:
    """Tiny Shakespeare in windows of 48 characters: 90 % to train, 5 % each to choose and test."""
    if folder is None:
        raise FileNotFoundError("Tiny Shakespeare needs --data, the folder of tinyshakespeare/")
    text = (folder / "tinyshakespeare" / "input.txt").read_text()
    vocabulary = sorted(set(text))
    codes = torch.tensor([vocabulary.index(c) for c in text])
    parts = codes.tensor_split([int(0.9 * len(codes)), int(0.95 * len(codes))])

    def windows(part: Tensor) -> TensorDataset:
        count = (len(part) - 1) // WINDOW
        x, y = part[: count * WINDOW], part[1 : count * WINDOW + 1]
        return TensorDataset(x.view(count, WINDOW), y.view(count, WINDOW))

    train, val, test = (windows(p) for p in parts)
    return Splits(train, val, test)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write beside the place and rename: other processes see a whole file or none."""
    part = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, part)
    part.replace(path)


# fmt: off
TASKS = {
    task.name: task
    for task in (
        Task("digits-cnn", lambda: DigitsCNN().layers, digits, (0.05, 0.01, 0.005, 0.003, 0.002),
             "sgd", 0.05, 5e-4, 64, 30, 96, label_smoothing=0.1),
        Task("digits-transformer", PatchTransformer, digits, (0.05, 0.01, 0.003),
             "adamw", 1e-3, 1e-2, 64, 60, 96, label_smoothing=0.1),
        Task("cifar-vgg", vgg, cifar10, (0.05, 0.01, 0.003),
             "adamw", 2e-3, 1e-2, 32, 20, 5, augment=True),
        Task("cifar-resnet8", resnet8, cifar10, (0.05, 0.01, 0.003),
             "sgd", 0.1, 5e-4, 32, 20, 5, augment=True),
        Task("shakespeare-lstm", lambda: CharLSTM(65), shakespeare, (0.2, 0.1, 0.05),
             "adamw", 4e-3, 1e-2, 32, 6, 2, metric="bpc"),
    )
}
# fmt: on
