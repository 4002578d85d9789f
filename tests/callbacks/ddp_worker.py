"""One compression run over two processes; each writes what it ended with.

``python ddp_worker.py FOLDER``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_condensa import CondensaCallback, Prune


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.validations = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return functional.cross_entropy(self.layers(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def on_validation_epoch_end(self) -> None:
        # The ranks disagree about which validation is the best; the mean is best at the third.
        scores = ([0, 9, 6, 1, 0], [0, 1, 6, 8, 0])[self.global_rank]
        self.log("score", float(scores[min(self.validations, 4)]))
        self.validations += not self.trainer.sanity_checking

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    x = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)
    for name, monitor in (("last", None), ("best", "score")):
        torch.manual_seed(0)
        module = Net()
        callback = CondensaCallback(Prune(0.2), schedule={"l_steps": 10}, monitor=monitor)
        saver = pl.callbacks.ModelCheckpoint(
            folder, filename=f"{name}-{{epoch}}", save_top_k=-1, every_n_epochs=1
        )
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=5,
            callbacks=[callback, saver],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader, loader)
        assert trainer.world_size == 2
        torch.save(module.state_dict(), folder / f"{name}-rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
