"""An interrupted run that goes on ends with the same bits as one that was not interrupted."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_condensa import Compose, CondensaCallback, Prune, Quantize, Scheme
from lightning_condensa.lc import Plan

EPOCHS, BATCHES = 10, 6


def callback_of(scheme: Scheme, l_steps: int, **kwargs: Any) -> CondensaCallback:
    return CondensaCallback(scheme, schedule={"l_steps": l_steps}, **kwargs)


def epochs_of_interest(callback: CondensaCallback, accumulate: int) -> dict[str, int]:
    """An epoch that ends between two C-steps, one right after a C-step, one in fine-tuning."""
    steps = BATCHES // accumulate
    plan = callback.schedule.plan(EPOCHS * steps)
    ends = {epoch: (epoch + 1) * steps for epoch in range(EPOCHS - 1)}
    return {
        "between": next(e for e, s in ends.items() if s not in plan.c_steps and e > 0),
        "after a C-step": next(
            e for e, s in ends.items() if s in plan.c_steps and s < plan.finetune_from
        ),
        "fine-tuning": next(e for e, s in ends.items() if s > plan.finetune_from),
    }


def assert_same(first: Any, second: Any, callbacks: list[CondensaCallback]) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    one, other = (c.compressed.theta for c in callbacks)
    for name in one:
        assert torch.equal(one[name].codes, other[name].codes)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_bit_for_bit(net, trainer, loader, tmp_path, optimizer, accumulate, precision) -> None:  # type: ignore[no-untyped-def]
    options = {
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": accumulate,
        "precision": precision,
        "gradient_clip_val": 1.0,
    }
    scheme = Compose([Prune(0.2), Quantize("float16")])
    whole = callback_of(scheme, 12 // accumulate)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    module = net(optimizer, scheduler=True)
    trainer(whole, saver, **options).fit(module, loader, loader)
    for where, epoch in epochs_of_interest(whole, accumulate).items():
        torch.manual_seed(99)
        other = type(module)(optimizer, scheduler=True)  # other weights, to be overwritten
        resumed = callback_of(scheme, 12 // accumulate)
        file = tmp_path / f"epoch={epoch}.ckpt"
        trainer(resumed, **options).fit(other, loader, loader, ckpt_path=file)
        try:
            assert_same(module, other, [whole, resumed])
        except AssertionError as error:
            raise AssertionError(f"resumed {where}") from error


class SaveAt(pl.Callback):
    """Saves a checkpoint after some optimizer steps, in the middle of an epoch where they are."""

    def __init__(self, folder: Path, steps: Collection[int]) -> None:
        self.folder, self.steps = folder, set(steps)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step in self.steps and not self.file(step).exists():
            trainer.save_checkpoint(self.file(step))

    def file(self, step: int) -> Path:
        return self.folder / f"{step}.ckpt"


@pytest.fixture
def stateful_net(net_class, batches):  # type: ignore[no-untyped-def]
    """A module that draws its own batches, and goes on drawing where a checkpoint left off."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))

    class Drawing(net_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_buffer("drawn", torch.tensor(0))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            generator = torch.Generator().manual_seed(int(self.drawn))
            self.drawn += 1
            mine = torch.randint(len(x), (16,), generator=generator)
            loss: Tensor = super().training_step([x[mine], y[mine]], batch_idx)
            return loss

    return Drawing


CONFIGURATIONS = list(product(["32-true", "bf16-mixed"], ["sgd", "adamw"], [1, 4]))
POINTS = 20


def interrupted_at(plan: Plan, total: int, number: int) -> int:
    """A random point in an L-step, right after a C-step or in fine-tuning: steps done."""
    between = sorted(set(range(1, plan.l_end)) - set(plan.c_steps))
    c_steps = [c for c in plan.c_steps if 0 < c < total]
    choices = (between, c_steps, range(plan.l_end + 1, total))
    return random.Random(number).choice(choices[number % 3])


def check_interruptions(  # type: ignore[no-untyped-def]
    stateful_net, trainer, loader, tmp_path, scheme, configuration, points
) -> None:
    precision, optimizer, accumulate = configuration
    options = {
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": accumulate,
        "precision": precision,
        "limit_val_batches": 1,
    }
    steps = EPOCHS * math.ceil(BATCHES / accumulate)  # an epoch's last ones accumulate less
    callback = callback_of(scheme, 6)
    plan = callback.schedule.plan(steps, projects=isinstance(scheme, Compose))
    saver = SaveAt(tmp_path, {interrupted_at(plan, steps, number) for number in points})

    def build() -> pl.LightningModule:
        return stateful_net(optimizer, scheduler=True)

    torch.manual_seed(0)
    module = build()
    trainer(callback, saver, **options).fit(module, loader, loader)
    for step in saver.steps:
        other, resumed = build(), callback_of(scheme, 6)
        trainer(resumed, **options).fit(other, loader, loader, ckpt_path=saver.file(step))
        try:
            assert_same(module, other, [callback, resumed])
        except AssertionError as error:
            raise AssertionError(f"interrupted after {step} of {steps} steps") from error


SCHEMES = [Prune(0.2), Compose([Prune(0.2), Quantize("int8")])]


@pytest.mark.parametrize("scheme", SCHEMES, ids=["p", "p+q"])
@pytest.mark.parametrize("number", range(len(CONFIGURATIONS)), ids=lambda n: str(CONFIGURATIONS[n]))
def test_interrupted_at_any_step(  # type: ignore[no-untyped-def]
    stateful_net, trainer, loader, tmp_path, scheme, number
) -> None:
    points = range(number, POINTS, len(CONFIGURATIONS))
    check_interruptions(
        stateful_net, trainer, loader, tmp_path, scheme, CONFIGURATIONS[number], points
    )


def test_saved_by_a_callback_whose_turn_is_before_ours(  # type: ignore[no-untyped-def]
    stateful_net, trainer, loader, tmp_path
) -> None:
    scheme, l_steps = SCHEMES[1], 6
    callback = callback_of(scheme, l_steps)
    plan = callback.schedule.plan(EPOCHS * BATCHES, projects=True)
    saver = SaveAt(tmp_path, {plan.c_steps[2], plan.c_steps[2] + 1, plan.l_end})
    torch.manual_seed(0)
    module = stateful_net("adamw", scheduler=True)
    options = {"max_epochs": EPOCHS, "limit_val_batches": 1}
    trainer(saver, callback, **options).fit(module, loader, loader)
    for step in saver.steps:
        other, resumed = stateful_net("adamw", scheduler=True), callback_of(scheme, l_steps)
        trainer(resumed, **options).fit(other, loader, loader, ckpt_path=saver.file(step))
        assert_same(module, other, [callback, resumed])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES, ids=["p", "p+q"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_interrupted_at_every_point_in_every_configuration(  # type: ignore[no-untyped-def]
    stateful_net, trainer, loader, tmp_path, scheme, configuration
) -> None:
    check_interruptions(
        stateful_net, trainer, loader, tmp_path, scheme, configuration, range(POINTS)
    )


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_with_a_monitor_the_best_survives(net, trainer, loader, tmp_path, preset) -> None:  # type: ignore[no-untyped-def]
    def build() -> CondensaCallback:
        schedule = {"l_steps": 7} if preset == "default" else {"steps": 8, "lr": 0.05}
        return CondensaCallback(
            Prune(0.2), preset, schedule=schedule, monitor="val_loss", mode="min"
        )  # type: ignore[arg-type]

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    whole, module = build(), net()
    trainer(whole, saver, max_epochs=EPOCHS).fit(module, loader, loader)
    for epoch in (2, 8):
        other, resumed = net("sgd"), build()
        file: Path = tmp_path / f"epoch={epoch}.ckpt"
        trainer(resumed, max_epochs=EPOCHS).fit(
            other, loader, loader, ckpt_path=file, weights_only=True
        )
        assert_same(module, other, [whole, resumed])


def test_another_scheme_is_an_error(net, trainer, loader, tmp_path) -> None:  # type: ignore[no-untyped-def]
    saver = ModelCheckpoint(tmp_path, filename="early", every_n_epochs=1)
    trainer(callback_of(Prune(0.2), 5), saver, max_epochs=2).fit(net(), loader)
    with pytest.raises(
        ValueError,
        match=r"another scheme: Prune\(density=0.2\), this callback has Prune\(density=0.3\)",
    ):
        trainer(callback_of(Prune(0.3), 5), max_epochs=4).fit(
            net(), loader, ckpt_path=tmp_path / "early.ckpt"
        )


def test_a_checkpoint_of_a_plain_run_starts_the_compression(  # type: ignore[no-untyped-def]
    net, trainer, loader, tmp_path, density
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="dense", every_n_epochs=1)
    trainer(saver, max_epochs=2).fit(net(), loader)
    module, callback = net(), callback_of(Prune(0.25), 5)
    trainer(callback, max_epochs=6).fit(module, loader, ckpt_path=tmp_path / "dense.ckpt")
    assert density(module) == 0.25


@pytest.mark.parametrize("schedule", [{"l_steps": 5}, {"every_n_steps": 1, "ramp": 1.0}])
def test_the_run_may_become_shorter_or_longer(  # type: ignore[no-untyped-def]
    net, trainer, loader, tmp_path, density, schedule
) -> None:
    def build() -> CondensaCallback:
        return CondensaCallback(Prune(0.25), schedule=schedule)

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer(build(), saver, max_epochs=5).fit(net(), loader)
    for epochs in (4, 8):
        module = net()
        trainer(build(), max_epochs=epochs).fit(
            module, loader, loader, ckpt_path=tmp_path / "epoch=2.ckpt"
        )
        assert density(module) == 0.25
