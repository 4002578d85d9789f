"""Compression runs over several processes; each process writes what it ended with.

``python ddp_worker.py monitor FOLDER`` lets two of them disagree about the best model,
``python ddp_worker.py worlds FOLDER`` does the same runs with one, two and four.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_condensa import Compose, CondensaCallback, Prune, Quantize

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Net(pl.LightningModule):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self.layers(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class Disagreeing(Net):
    """The ranks disagree about which validation is the best; the mean is best at the third."""

    def __init__(self) -> None:
        super().__init__()
        self.validations = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def on_validation_epoch_end(self) -> None:
        scores = ([0, 9, 6, 1, 0], [0, 1, 6, 8, 0])[self.global_rank]
        self.log("score", float(scores[min(self.validations, 4)]))
        self.validations += not self.trainer.sanity_checking


def data(samples: int, seed: int = 0) -> TensorDataset:
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(1))


def monitor(folder: Path) -> None:
    """Two processes, launched as users launch them."""
    loader = DataLoader(data(128), batch_size=8)
    for name, metric in (("last", None), ("best", "score")):
        torch.manual_seed(0)
        module = Disagreeing()
        callback = CondensaCallback(Prune(0.2), schedule={"l_steps": 10}, monitor=metric)
        saver = pl.callbacks.ModelCheckpoint(
            folder, filename=f"{name}-{{epoch}}", save_top_k=-1, every_n_epochs=1
        )
        trainer = pl.Trainer(
            devices=2,
            strategy="ddp",
            max_epochs=5,
            callbacks=[callback, saver],
            default_root_dir=folder,
            **QUIET,
        )
        trainer.fit(module, loader, loader)
        assert trainer.world_size == 2
        torch.save(module.state_dict(), folder / f"{name}-rank{trainer.global_rank}.pt")


class Write(pl.Callback):
    """Writes what each process ends with, inside of it."""

    def __init__(self, compression: CondensaCallback, name: str, folder: Path) -> None:
        self.compression, self.name, self.folder = compression, name, folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert f"-{trainer.world_size}" in self.name
        codes = {n: e.codes for n, e in self.compression.compressed.theta.items()}
        x, y = data(1000, seed=1).tensors
        with torch.no_grad():
            accuracy = float((pl_module.layers(x).argmax(1) == y).float().mean())  # type: ignore[operator]
        result = {"codes": codes, "module": pl_module.state_dict(), "accuracy": accuracy}
        torch.save(result, self.folder / f"{self.name}-rank{trainer.global_rank}.pt")


def worlds(folder: Path) -> None:
    """The same samples in each step, by one, two and four processes."""
    accuracy = {}
    for kind, scheme in (
        ("p", Prune(0.15)),
        ("p+int8", Compose([Prune(0.15), Quantize("int8")])),
    ):
        for world in (1, 2, 4):
            torch.manual_seed(0)
            module = Net(width=32)
            callback = CondensaCallback(scheme, schedule={"l_steps": 20})
            name = f"{kind}-{world}"
            trainer = pl.Trainer(
                devices=world,
                # Forked, they need not import everything again.
                strategy="ddp_fork" if world > 1 else "auto",
                max_epochs=6,
                callbacks=[callback, Write(callback, name, folder)],
                enable_checkpointing=False,
                default_root_dir=folder,
                **QUIET,
            )
            loader = DataLoader(data(512), batch_size=32 // world)
            trainer.fit(module, loader)
            result = torch.load(folder / f"{name}-rank0.pt", weights_only=True)
            accuracy[name] = result["accuracy"]
    (folder / "accuracy.json").write_text(json.dumps(accuracy))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"monitor": monitor, "worlds": worlds}[sys.argv[1]](Path(sys.argv[2]))
