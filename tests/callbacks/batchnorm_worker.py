"""A run with batch norm over two processes; each writes the statistics that it validated with.

``python batchnorm_worker.py FOLDER``
"""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_condensa import CondensaCallback, Prune


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
        )
        self.inputs: list[Tensor] = []
        self.validated: list[dict[str, Tensor]] = []
        self.expected: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.inputs.append(batch[0])
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and not self.trainer.sanity_checking:
            state = self.layers.state_dict()
            self.validated.append({n: t.clone() for n, t in state.items() if "running" in n})
            self.expected = self.expected or self.alone()

    def alone(self) -> dict[str, Tensor]:
        """Statistics of this process's own batches."""
        twin = deepcopy(self.layers)
        twin[1].reset_running_stats()
        twin[1].momentum = None
        twin.train()
        for x in self.inputs[-3:]:
            twin(x)
        return {n: t.clone() for n, t in twin.state_dict().items() if "running" in n}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    x = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)
    torch.manual_seed(0)
    module = Net()
    callback = CondensaCallback(Prune(0.2), schedule={"l_steps": 4, "shape": 1.0}, bn_batches=3)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        callbacks=[callback],
        default_root_dir=folder,
        inference_mode=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)
    assert trainer.world_size == 2
    results = {"validated": module.validated, "expected": module.expected}
    torch.save(results, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
