"""Where the default teacher comes from: a copy at the start of fit, or a checkpoint."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from lightning_condensa import CondensaCallback, Prune
from lightning_condensa.callbacks.distillation import Distillation

# -- the copy --------------------------------------------------------------------------------------


def fit_and_copy(trainer, module: pl.LightningModule, loader: Any, **kwargs: Any) -> nn.Module:  # type: ignore[no-untyped-def]
    callback = Distillation(**kwargs)
    trainer(callback, max_epochs=1).fit(module, loader)
    assert callback._copy is not None
    return callback._copy


def test_metrics_locks_and_masks_do_not_stop_the_copy(net, net_class, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    class Busy(net_class):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(3)
            self.layers[0].lock = threading.Lock()  # type: ignore[assignment]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            logits = self(batch[0])
            self.log("accuracy", self.accuracy(logits, batch[1]))
            return functional.cross_entropy(logits, batch[1])

    module = net(cls=Busy)
    torch.nn.utils.prune.random_unstructured(module.layers[0], "weight", 0.5)  # type: ignore[no-untyped-call]
    x = torch.randn(5, 8)
    expected = module.eval()(x).detach()
    with pytest.warns(UserWarning, match=r"cannot be copied with the module: \['layers.0.lock'\]"):
        twin = fit_and_copy(trainer, module, loader)
    assert torch.equal(twin(x), expected)
    assert not torch.equal(module.eval()(x), expected)


def test_a_copy_that_still_uses_the_original_is_an_error(net, net_class, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    class Closure(net_class):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.run = lambda x: self.layers(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    with pytest.raises(ValueError, match="the copy of Closure still uses weights of the original"):
        trainer(Distillation(), max_epochs=1).fit(net(cls=Closure), loader)
    trainer(Distillation(teacher=net()), max_epochs=1).fit(net(cls=Closure), loader)


def test_inputs_of_the_student_may_need_gradients(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    module = net()
    start = module.layers[3].weight.detach().clone()
    twin = fit_and_copy(trainer, module, loader, layer="layers.3")
    assert torch.equal(twin.weight, start)  # type: ignore[arg-type]
    assert not torch.equal(module.layers[3].weight, start)


def test_a_sharded_module_needs_a_teacher(net, trainer, loader, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(pl.strategies.Strategy, "restore_checkpoint_after_setup", True)
    with pytest.raises(ValueError, match="cannot copy a module that SingleDeviceStrategy shards"):
        trainer(Distillation(), max_epochs=1).fit(net(), loader)
    trainer(Distillation(teacher=nn.Linear(8, 3)), max_epochs=1).fit(net(), loader)


# -- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("compress", [False, True])
def test_resume_is_bit_identical(net, trainer, loader, tmp_path, optimizer, compress) -> None:  # type: ignore[no-untyped-def]
    def callbacks() -> list[pl.Callback]:
        beside = [CondensaCallback(Prune(0.25), schedule={"l_steps": 5})] if compress else []
        return [*beside, Distillation()]

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    module = net(optimizer)
    trainer(*callbacks(), saver, max_epochs=6).fit(module, loader, loader)
    file = tmp_path / "epoch=2.ckpt"
    saved = torch.load(file, weights_only=True)
    assert not any("teacher" in name for name in saved["state_dict"])
    torch.manual_seed(99)
    other = type(module)(optimizer)  # other weights: neither student nor teacher may keep them
    trainer(*callbacks(), max_epochs=6).fit(
        other, loader, loader, ckpt_path=file, weights_only=True
    )
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_checkpoint_after_fit_still_holds_the_teacher(net, trainer, loader, tmp_path) -> None:  # type: ignore[no-untyped-def]
    module, start = net(), net()
    runs = trainer(Distillation(), max_epochs=2)
    runs.fit(module, loader)
    runs.save_checkpoint(tmp_path / "end.ckpt")
    callback = Distillation()
    trainer(callback, max_epochs=3).fit(net("sgd"), loader, ckpt_path=tmp_path / "end.ckpt")
    for name, value in callback._copy.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, start.state_dict()[name])


def test_a_second_fit_learns_from_its_own_start(net, trainer, loader, tmp_path) -> None:  # type: ignore[no-untyped-def]
    callback, module = Distillation(), net()
    runs = trainer(callback, max_epochs=1)
    runs.fit(module, loader)
    runs.save_checkpoint(tmp_path / "end.ckpt")
    runs.test(module, loader, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    start = copy.deepcopy(module.state_dict())
    trainer(callback, max_epochs=1).fit(module, loader)
    for name, value in callback._copy.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, start[name])


def test_a_checkpoint_needs_the_teacher_it_was_made_with(net, trainer, loader, tmp_path) -> None:  # type: ignore[no-untyped-def]
    saver = ModelCheckpoint(tmp_path, filename="given", every_n_epochs=1)
    trainer(Distillation(teacher=nn.Linear(8, 3)), saver, max_epochs=1).fit(net(), loader)
    with pytest.raises(ValueError, match="give teacher again"):
        trainer(Distillation(), max_epochs=2).fit(net(), loader, ckpt_path=tmp_path / "given.ckpt")
    saver = ModelCheckpoint(tmp_path, filename="copied", every_n_epochs=1)
    trainer(Distillation(), saver, max_epochs=1).fit(net(), loader)
    with pytest.raises(ValueError, match="does not fit Sequential"):
        trainer(Distillation(layer="layers"), max_epochs=2).fit(
            net(), loader, ckpt_path=tmp_path / "copied.ckpt"
        )
