from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_condensa import CondensaCallback, Prune, compress_ladder, geometric_densities

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.fixture
def loader() -> DataLoader[tuple[Tensor, ...]]:
    torch.manual_seed(0)
    x = torch.randn(64, 10)
    return DataLoader(TensorDataset(x, x[:, :2].sin()), batch_size=16)


def density(module: pl.LightningModule) -> float:
    weights = [p for n, p in module.named_parameters() if n.endswith("weight")]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def test_densities_fall_at_equal_ratios_to_the_target() -> None:
    densities = geometric_densities(0.05, 3, start=0.4)
    assert densities == pytest.approx([0.2, 0.1, 0.05])


@pytest.mark.parametrize(("target", "rungs"), [(0.0, 2), (1.0, 2), (0.1, 0), (0.1, 1.5)])
def test_densities_out_of_range(target: float, rungs: int) -> None:
    with pytest.raises(ValueError, match=r"rungs|densities"):
        geometric_densities(target, rungs)


def test_every_rung_starts_from_the_one_before(loader: DataLoader[tuple[Tensor, ...]]) -> None:
    torch.manual_seed(1)
    module = Regression()
    started: list[float] = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            started.append(density(pl_module))

    seen: list[int] = []
    results = compress_ladder(
        module,
        [Prune(0.5), Prune(0.2), Prune(0.1)],
        trainer={"max_epochs": 5, "callbacks": [Watch()], **QUIET},
        distillation={"weight": 0.5},
        on_rung=lambda rung, _: seen.append(rung),
        fit={"train_dataloaders": loader},
        schedule={"l_steps": 4},
    )
    kept = [round(d * 240) / 240 for d in (0.5, 0.2, 0.1)]
    assert started == pytest.approx([1.0, *kept[:2]])
    assert [density(r.module) for r in results] == pytest.approx(kept)  # type: ignore[arg-type]
    assert density(module) == pytest.approx(kept[-1])
    assert seen == [0, 1, 2]


def test_a_sparse_start_never_gets_denser(loader: DataLoader[tuple[Tensor, ...]]) -> None:
    torch.manual_seed(1)
    module = Regression()
    trainer = pl.Trainer(max_epochs=5, callbacks=[CondensaCallback(Prune(0.3))], **QUIET)
    trainer.fit(module, loader)
    densities: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
        ) -> None:
            densities.append(density(pl_module))

    callbacks = [CondensaCallback(Prune(0.1)), Watch()]
    pl.Trainer(max_epochs=5, callbacks=callbacks, **QUIET).fit(module, loader)
    assert max(densities) <= 0.3 + 1e-9
    assert densities[-1] == pytest.approx(0.1)


def test_no_schemes() -> None:
    with pytest.raises(ValueError, match="schemes"):
        compress_ladder(Regression(), [], trainer={})
