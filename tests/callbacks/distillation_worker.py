"""Distillation over two processes; each writes what it ended with, beside what plain torch gives.

``python distillation_worker.py FOLDER``
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_condensa.callbacks.distillation import Distillation
from lightning_condensa.functional.distillation import distillation_loss

DEVICES, BATCH, EPOCHS, ACCUMULATE = 2, 16, 3, 2


class Net(pl.LightningModule):
    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.idle = nn.Linear(2, 2) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def plain_loop(module: Net, x: Tensor, y: Tensor) -> None:
    teacher = copy.deepcopy(module)
    optimizer = module.configure_optimizers()
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True)) * EPOCHS
    for step, (inputs, labels) in enumerate(batches, start=1):
        logits = module(inputs)
        term = distillation_loss(logits, teacher(inputs).detach())
        (0.4 * functional.cross_entropy(logits, labels) + 0.6 * term).div(ACCUMULATE).backward()
        if step % ACCUMULATE == 0:
            optimizer.step()
            optimizer.zero_grad()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    x = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    own = range(int(os.environ.get("LOCAL_RANK", 0)), len(x), DEVICES)
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH // DEVICES, sampler=own)
    for strategy in ("ddp", "ddp_find_unused_parameters_true"):
        torch.manual_seed(0)
        module = Net(unused=strategy != "ddp")
        reference = copy.deepcopy(module)
        plain_loop(reference, x, y)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=DEVICES,
            strategy=strategy,
            use_distributed_sampler=False,
            max_epochs=EPOCHS,
            accumulate_grad_batches=ACCUMULATE,
            callbacks=[Distillation(weight=0.6)],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
        assert trainer.world_size == DEVICES
        torch.save(reference.state_dict(), folder / f"{strategy}-plain.pt")
        torch.save(module.state_dict(), folder / f"{strategy}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
