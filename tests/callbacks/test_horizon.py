"""C-steps come at the planned shares of a run, however its steps are counted."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from lightning_condensa import CondensaCallback, Prune

SHORT = {"l_steps": 6}


# warned of where a plan is not used up
pytestmark = pytest.mark.filterwarnings("error:training stopped")


def callback_of(density: float = 0.25, **kwargs: Any) -> CondensaCallback:
    return CondensaCallback(Prune(density, scope="layer"), schedule=SHORT, **kwargs)


@pytest.mark.parametrize("max_steps", [-1, 17])
def test_a_schedule_of_gradient_accumulation(  # type: ignore[no-untyped-def]
    net, trainer, loader, c_steps, max_steps
) -> None:
    # epochs of 6 batches: 6 + 6 + 2 + 2 + 2 + 1 + 1 + 1 optimizer steps
    scheduler, callback = GradientAccumulationScheduler({2: 3, 5: 7}), callback_of()
    trained = trainer(scheduler, callback, max_epochs=8, max_steps=max_steps)
    trained.fit(net(), loader, loader)
    steps = 21 if max_steps == -1 else 17
    assert trained.global_step == steps
    assert c_steps == list(callback.schedule.plan(steps).c_steps)


def test_a_schedule_of_gradient_accumulation_has_no_epochs_to_count(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    callback = CondensaCallback(Prune(0.25), schedule={"every_n_epochs": 1})
    with pytest.raises(ValueError, match="every_n_epochs needs epochs of a known length"):
        trainer(GradientAccumulationScheduler({1: 2}), callback, max_epochs=4).fit(net(), loader)


class Manual(pl.LightningModule):
    """As many optimizers as told, each stepping in every ``period``-th batch."""

    def __init__(self, optimizers: int = 1, period: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.period = period
        self.parts = nn.ModuleList(nn.Linear(8, 3) for _ in range(optimizers))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for part, optimizer in zip(self.parts, optimizers, strict=True):
            self.manual_backward(functional.cross_entropy(part(batch[0]), batch[1]))
            if (batch_idx + 1) % self.period == 0:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(p.parameters(), lr=0.1, momentum=0.9) for p in self.parts]


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("optimizers", [1, 2])
def test_manual_optimization_counts_batches(  # type: ignore[no-untyped-def]
    trainer, loader, c_steps, density, optimizers, period
) -> None:
    module, callback = Manual(optimizers, period), callback_of()
    trained = trainer(callback, max_epochs=6)
    trained.fit(module, loader)
    assert trained.global_step == 36 * optimizers // period
    assert c_steps == list(callback.schedule.plan(36).c_steps)
    assert density(module) == 0.25


@pytest.mark.parametrize("optimizers", [1, 2, 3])
def test_max_steps_counts_every_optimizer(trainer, loader, c_steps, density, optimizers) -> None:  # type: ignore[no-untyped-def]
    module, callback = Manual(optimizers), callback_of()
    trainer(callback, max_steps=30).fit(module, loader)
    assert c_steps == list(callback.schedule.plan(30 // optimizers).c_steps)
    assert density(module) == 0.25


def test_fit_goes_on_with_the_same_callback_and_trainer(  # type: ignore[no-untyped-def]
    net, trainer, loader, batches, c_steps, density
) -> None:
    module, callback = net(), callback_of()
    trained = trainer(callback, max_epochs=4)
    trained.fit(module, loader)
    first = callback.compressed
    trained.fit(module, loader)  # no epochs are left: nothing happens
    assert callback.compressed is first
    assert c_steps == list(callback.schedule.plan(24).c_steps)

    trained.fit_loop.max_epochs = 7
    c_steps.clear()
    trained.fit(module, DataLoader(loader.dataset, batch_size=48))  # two batches an epoch
    assert c_steps == list(callback.schedule.plan(6).c_steps)
    assert callback.compressed is not first
    assert density(module) == 0.25


class Stream(IterableDataset[Any]):
    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_data_of_unknown_length(net, trainer, batches, c_steps, density) -> None:  # type: ignore[no-untyped-def]
    loader = DataLoader(Stream(batches), batch_size=None)
    module, callback = net(), callback_of()
    trainer(callback, max_steps=20).fit(module, loader)
    assert c_steps == list(callback.schedule.plan(20).c_steps)
    assert density(module) == 0.25
    with pytest.raises(ValueError, match=r"set max_epochs or max_steps .*inf batches an epoch"):
        trainer(callback_of(), max_epochs=2).fit(net(), loader)
