"""Callbacks that average weights: the average is compressed, whatever the order of callbacks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from lightning_condensa import Compose, CondensaCallback, Prune, Quantize, load_compressed

averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging")

SHORT = {"l_steps": 6}
DENSITY = 0.25
SCHEMES = [Prune(DENSITY), Compose([Prune(DENSITY), Quantize("int8")])]


def ordered(first: bool, own: pl.Callback, other: pl.Callback) -> list[pl.Callback]:
    return [own, other] if first else [other, own]


def ema(decay: float = 0.9) -> pl.Callback:
    return averaging.EMAWeightAveraging(decay=decay)


@pytest.fixture
def plain(net, net_class):  # type: ignore[no-untyped-def]
    """Without batch norm; remembers the weights of each validation and each epoch's start."""

    class Plain(net_class):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__("adamw")
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
            self.validated: list[dict[str, torch.Tensor]] = []
            self.trained: list[dict[str, torch.Tensor]] = []
            self.epochs: list[dict[str, torch.Tensor]] = []

        def now(self) -> dict[str, torch.Tensor]:
            return {n: t.detach().clone() for n, t in self.state_dict().items()}

        def on_train_epoch_start(self) -> None:
            self.epochs.append(self.now())

        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.trained.append(self.now())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if batch_idx == 0 and not self.trainer.sanity_checking:
                self.validated.append(self.now())

    torch.manual_seed(0)
    return Plain()


class Averages(pl.Callback):
    """The exponential moving average, computed once more."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.values: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:  # type: ignore[no-untyped-def]
        for n, p in pl_module.named_parameters():
            old = self.values.get(n, p.detach().clone())
            self.values[n] = torch.lerp(p.detach(), old, self.decay)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("first", [True, False])
def test_the_average_is_compressed_validated_and_saved(  # type: ignore[no-untyped-def]
    plain, trainer, loader, tmp_path, density, first, scheme
) -> None:
    callback, own = CondensaCallback(scheme, schedule=SHORT), Averages()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callbacks = ordered(first, callback, ema())
    trained = trainer(own, *callbacks, saver, max_epochs=6)
    trained.fit(plain, loader, loader)

    theta = callback.compressed.theta
    kept = {n: e.mask for n, e in theta.items()}
    assert sum(int(m.sum()) for m in kept.values()) == round(DENSITY * 176)
    expected = dict(own.values)
    for name, mask in kept.items():
        expected[name] = torch.where(mask, own.values[name], 0)
    for name, value in plain.state_dict().items():
        exact = name not in theta or len(scheme.stages) == 1
        tolerance = 1e-6 if exact else float(expected[name].abs().max()) / 127
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance)

    assert len(plain.validated) == 6
    for epoch, seen in enumerate(plain.validated):
        state = torch.load(tmp_path / f"{epoch=}.ckpt", weights_only=True)["state_dict"]
        for name, value in seen.items():
            assert torch.equal(value, state[name])
        assert sum(int(seen[n].count_nonzero()) for n in theta) <= round(DENSITY * 176)
    # afterwards, too, when WeightAveraging swaps its average in again
    (scores,) = trained.validate(plain, loader, verbose=False)
    last = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)["state_dict"]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, plain.validated[-1][name])
        assert torch.equal(value, last[name])
    assert scores["val_loss"] == pytest.approx(float(trained.callback_metrics["val_loss"]))
    trained.save_checkpoint(tmp_path / "after.ckpt")
    after = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(after[n], last[n]) for n in last)


@pytest.mark.parametrize("first", [True, False])
def test_a_run_with_averages_resumes_bit_for_bit(  # type: ignore[no-untyped-def]
    net, trainer, loader, tmp_path, first
) -> None:
    def callbacks() -> list[pl.Callback]:
        callback = CondensaCallback(SCHEMES[1], schedule=SHORT, monitor="val_loss", mode="min")
        return ordered(first, callback, ema())

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = net("adamw")
    trainer(*callbacks(), saver, max_epochs=6).fit(whole, loader, loader)
    for epoch in (1, 4):
        torch.manual_seed(9)
        other = type(whole)("adamw")
        trainer(*callbacks(), max_epochs=6).fit(
            other, loader, loader, ckpt_path=tmp_path / f"{epoch=}.ckpt"
        )
        for name, value in whole.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), (epoch, name)


def test_averaging_may_begin_or_end_with_a_resumed_run(  # type: ignore[no-untyped-def]
    net, trainer, loader, tmp_path, density
) -> None:
    for before, after in (([], [ema()]), ([ema()], [])):
        saver = ModelCheckpoint(tmp_path, filename="half", enable_version_counter=False)
        trainer(CondensaCallback(Prune(DENSITY), schedule=SHORT), *before, saver, max_epochs=2).fit(
            net(), loader
        )
        module = net()
        trainer(CondensaCallback(Prune(DENSITY), schedule=SHORT), *after, max_epochs=4).fit(
            module, loader, loader, ckpt_path=tmp_path / "half.ckpt"
        )
        assert density(module) == DENSITY


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging(plain, trainer, loader, first, scheme) -> None:  # type: ignore[no-untyped-def]
    callback = CondensaCallback(scheme, schedule=SHORT)
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=0.75, annealing_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training stopped")
        trainer(*ordered(first, callback, swa), max_epochs=8).fit(plain, loader)
    # SWA averages what it finds when epochs begin
    names = dict(plain.named_parameters())
    mean = {n: (plain.epochs[5][n] + plain.epochs[6][n] + plain.epochs[7][n]) / 3 for n in names}
    for name, encoded in callback.compressed.theta.items():
        tolerance = 1e-6 if len(scheme.stages) == 1 else float(mean[name].abs().max()) / 127
        value = plain.state_dict()[name]
        assert torch.equal(value, encoded.decode())
        expected = torch.where(encoded.mask, mean[name], 0)
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)
    kept = sum(int(e.mask.sum()) for e in callback.compressed.theta.values())
    assert kept == round(DENSITY * 176)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("first", [True, False])
def test_the_epoch_that_swa_adds_for_batch_norm(  # type: ignore[no-untyped-def]
    net, trainer, loader, c_steps, first, scheme
) -> None:
    module, callback = net(), CondensaCallback(scheme, schedule=SHORT)
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=6, annealing_epochs=1)
    trained = trainer(*ordered(first, callback, swa), max_epochs=8)
    trained.fit(module, loader, loader)
    assert trained.global_step == 49  # the last one has no gradients
    projects = len(scheme.stages) > 1
    assert c_steps == list(callback.schedule.plan(48, projects=projects).c_steps)
    kept = sum(int(e.mask.sum()) for e in callback.compressed.theta.values())
    assert kept == round(DENSITY * 176)
    # cumulative statistics of the average, over one epoch
    x = torch.cat([b[0] for b in loader])
    means = torch.stack([module.layers[0](b).mean(0) for b in x.split(16)]).mean(0)
    tolerance = 5e-3 if projects else 1e-5  # of the average, before it is rounded
    torch.testing.assert_close(module.layers[1].running_mean, means, rtol=0, atol=tolerance)
    assert module.layers[1].momentum == 0.1


def test_averages_on_another_device_and_a_packed_file(  # type: ignore[no-untyped-def]
    net, net_class, trainer, loader, tmp_path
) -> None:
    callback, module = CondensaCallback(SCHEMES[1], schedule=SHORT), net()
    average = averaging.EMAWeightAveraging(device="cpu")
    trainer(callback, average, max_epochs=4).fit(module, loader, loader)
    callback.compressed.save(tmp_path / "net.condensa")
    loaded = load_compressed(tmp_path / "net.condensa", net_class())
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in module.state_dict().items())


@pytest.mark.parametrize("other", ["ema", "swa"])
def test_the_papers_theta_is_no_function_of_averages(net, trainer, loader, other) -> None:  # type: ignore[no-untyped-def]
    average = ema() if other == "ema" else StochasticWeightAveraging(0.01)
    callback = CondensaCallback(Prune(DENSITY), "paper", schedule={"steps": 4})
    with pytest.raises(ValueError, match="weights that could be averaged: use preset='default'"):
        trainer(callback, average, max_epochs=4).fit(net(), loader)
