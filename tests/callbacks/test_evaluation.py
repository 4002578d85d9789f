"""Validation, test, checkpoints and early stopping see θ."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from lightning_condensa import Compose, CondensaCallback, Prune, Quantize

SHORT = {"l_steps": 6}
SOFT = {**SHORT, "prune_rate": 0.1}  # training weights differ from θ for long
DENSITY = 0.125


class Watch(pl.Callback):
    """Weights just before and after each validation, and the scores in it."""

    def __init__(self) -> None:
        self.last: dict[str, torch.Tensor] = {}
        self.dense_until = 0
        self.checked = 0
        self.scores: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:  # type: ignore[no-untyped-def]
        self.last = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        if all(bool(p.all()) for p in self.last.values()):
            self.dense_until = trainer.global_step

    def on_validation_end(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
        if trainer.sanity_checking:
            return
        self.scores.append(float(trainer.callback_metrics["val_loss"]))
        for n, p in pl_module.named_parameters():
            assert torch.equal(p.detach(), self.last[n])
            assert not p.is_inference()
        self.checked += 1


@pytest.fixture
def watched(net_class, density):  # type: ignore[no-untyped-def]
    class Watched(net_class):  # type: ignore[misc, valid-type]
        densities: list[float]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if not self.trainer.sanity_checking:
                self.densities.append(density(self))

    return Watched


@pytest.mark.parametrize("inference_mode", [True, False])
def test_validation_sees_theta_and_training_does_not(  # type: ignore[no-untyped-def]
    net, watched, trainer, loader, inference_mode
) -> None:
    module, watch = net(cls=watched), Watch()
    module.densities = []
    callback = CondensaCallback(Prune(DENSITY), schedule=SOFT)
    trainer(callback, watch, max_epochs=4, val_check_interval=2, inference_mode=inference_mode).fit(
        module, loader, loader
    )
    assert watch.checked == 12
    assert len(module.densities) == 12 * 6
    assert set(module.densities) == {DENSITY}
    assert watch.dense_until > 6  # the training weights were not, for more than an epoch


def test_validation_does_not_change_training(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    results = []
    for val in (None, loader):
        module = net("adamw")
        callback = CondensaCallback(Prune(DENSITY), schedule=SHORT)
        trainer(callback, max_epochs=4).fit(module, loader, val)
        results.append(module.state_dict())
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.parametrize("scheme", [Prune(DENSITY), Compose([Prune(DENSITY), Quantize("float16")])])
def test_checkpoints_hold_theta(net, net_class, trainer, loader, tmp_path, density, scheme) -> None:  # type: ignore[no-untyped-def]
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    trained = trainer(CondensaCallback(scheme, schedule=SHORT), saver, max_epochs=4)
    trained.fit(net(), loader, loader)
    files = sorted(tmp_path.glob("epoch*.ckpt"))
    assert len(files) == 4
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        fresh = net_class()
        fresh.load_state_dict(checkpoint["state_dict"], strict=True)
        assert density(fresh) == DENSITY
        result = trained.test(net_class(), loader, ckpt_path=file, weights_only=True, verbose=False)
        assert result[0]["test_density"] == DENSITY
        (result,) = trainer().test(net_class(), loader, ckpt_path=file, verbose=False)
        assert result["test_density"] == DENSITY
    loaded = net_class.load_from_checkpoint(files[0])
    assert density(loaded) == DENSITY


def test_a_checkpoint_after_fit_is_plain(
    net, net_class, trainer, loader, tmp_path, density
) -> None:  # type: ignore[no-untyped-def]
    trained = trainer(CondensaCallback(Prune(DENSITY), schedule=SHORT), max_epochs=2)
    trained.fit(net(), loader)
    trained.save_checkpoint(tmp_path / "after.ckpt")
    assert density(net_class.load_from_checkpoint(tmp_path / "after.ckpt")) == DENSITY


def test_a_checkpoint_that_was_tested_does_not_leak_into_the_next_fit(  # type: ignore[no-untyped-def]
    net, trainer, loader, tmp_path
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="early", every_n_epochs=1)
    trainer(CondensaCallback(Prune(DENSITY), schedule=SHORT), saver, max_epochs=2).fit(
        net(), loader
    )
    results = []
    for tested in (False, True):
        callback = CondensaCallback(Prune(DENSITY), schedule=SHORT)
        if tested:
            trainer(callback).test(net(), loader, ckpt_path=tmp_path / "early.ckpt", verbose=False)
        module = net()
        trainer(callback, max_epochs=4).fit(module, loader)
        results.append(module.state_dict())
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_weights_only_checkpoints_warn(net, trainer, loader, tmp_path) -> None:  # type: ignore[no-untyped-def]
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="save_weights_only=True holds the training weights"):
        trainer(CondensaCallback(Prune(DENSITY)), saver, max_epochs=1).fit(net(), loader)


def scores_of(net_class, values: list[float]):  # type: ignore[no-untyped-def]
    class Scored(net_class):  # type: ignore[misc, valid-type]
        """Logs given scores, one per validation, and remembers θ of each."""

        def on_fit_start(self) -> None:
            self.thetas: list[dict[str, torch.Tensor]] = []

        def on_validation_epoch_end(self) -> None:
            if self.trainer.sanity_checking:
                self.log("score", 1e9)
                return
            self.log("score", values[len(self.thetas)])
            self.thetas.append({n: t.clone() for n, t in self.state_dict().items()})

    return Scored


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("max", [0.1, 0.7, 0.3, 0.2], 1),
        ("min", [0.3, 0.2, 0.1, 0.4], 2),
        ("max", [0.5, 0.5, 0.5, 0.5], 3),  # of equals the last, which is trained longest
        ("max", [0.9, float("nan"), 0.1, 0.2], 0),
        ("min", [0.9, 0.8, float("inf"), float("-inf")], 1),
    ],
)
def test_the_best_theta_is_left_in_the_module(  # type: ignore[no-untyped-def]
    net, net_class, trainer, loader, density, mode, values, best
) -> None:
    module = net(cls=scores_of(net_class, values))
    callback = CondensaCallback(Prune(DENSITY), schedule=SHORT, monitor="score", mode=mode)
    trainer(callback, max_epochs=4).fit(module, loader, loader)
    assert density(module) == DENSITY
    for name, value in module.state_dict().items():  # with batch norm's statistics
        if name != "layers.1.num_batches_tracked":
            assert torch.equal(value, module.thetas[best][name]), name
    for name, encoded in callback.compressed.theta.items():
        assert torch.equal(encoded.decode(), module.thetas[best][name])


def test_a_monitor_that_was_never_finite_warns(net, net_class, trainer, loader, density) -> None:  # type: ignore[no-untyped-def]
    module = net(cls=scores_of(net_class, [float("nan")] * 2))
    callback = CondensaCallback(Prune(DENSITY), schedule=SHORT, monitor="score")
    with pytest.warns(UserWarning, match="monitor='score' was never measured"):
        trainer(callback, max_epochs=2).fit(module, loader, loader)
    assert density(module) == DENSITY


@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_a_monitor_that_is_not_logged_is_an_error(net, trainer, loader, sanity_steps) -> None:  # type: ignore[no-untyped-def]
    callback = CondensaCallback(Prune(DENSITY), schedule=SOFT, monitor="accuracy")
    module = net()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with pytest.raises(ValueError, match=r"monitor='accuracy' is not logged.*val_acc.*val_loss"):
        trainer(callback, max_epochs=2, num_sanity_val_steps=sanity_steps).fit(
            module, loader, loader
        )
    untouched = all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    if sanity_steps:
        assert untouched  # found before any training
    else:
        assert not untouched
        # the training weights are back, not θ
        assert all(bool(p.detach().all()) for p in module.parameters())


@pytest.mark.parametrize("arguments", [{}, {"limit_val_batches": 0}])
def test_a_monitor_without_validation_is_an_error(net, trainer, loader, arguments) -> None:  # type: ignore[no-untyped-def]
    callback = CondensaCallback(Prune(DENSITY), monitor="val_acc")
    val = loader if arguments else None
    with pytest.raises(ValueError, match="monitor='val_acc' needs validation"):
        trainer(callback, max_epochs=2, **arguments).fit(net(), loader, val)


def test_early_stopping_and_checkpoints_monitor_the_compressed_model(  # type: ignore[no-untyped-def]
    net, trainer, loader, batches, tmp_path
) -> None:
    watch = Watch()
    stopping = EarlyStopping("val_loss", patience=100)
    saver = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    # 2 of 16 neurons' worth of weights: far from the dense network's loss early on
    callback = CondensaCallback(Prune(0.05), schedule=SHORT)
    trained = trainer(callback, watch, stopping, saver, max_epochs=5)
    trained.fit(net(), loader, loader)
    assert float(stopping.best_score) == pytest.approx(min(watch.scores))
    assert float(saver.best_model_score) == pytest.approx(min(watch.scores))
    (result,) = trainer().validate(net(), loader, ckpt_path=saver.best_model_path, verbose=False)
    assert result["val_loss"] == pytest.approx(min(watch.scores))


def test_early_stopping_stops(net, net_class, trainer, loader, density) -> None:  # type: ignore[no-untyped-def]
    module = net(cls=scores_of(net_class, [0.5, 0.6, 0.7, 0.8, 0.9]))
    callback = CondensaCallback(Prune(DENSITY), schedule=SHORT, monitor="score", mode="min")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(callback, EarlyStopping("score", patience=2), max_epochs=5).fit(
            module, loader, loader
        )
    assert len(module.thetas) == 3
    assert torch.equal(module.state_dict()["layers.0.weight"], module.thetas[0]["layers.0.weight"])


def test_validation_outside_fit_is_left_alone(net, trainer, loader, density) -> None:  # type: ignore[no-untyped-def]
    callback = CondensaCallback(Prune(DENSITY), schedule=SHORT)
    module = net()
    trained = trainer(callback, max_epochs=2)
    trained.validate(module, loader, verbose=False)
    assert density(module) == 1
    trained.fit(module, loader, loader)
    trained.validate(module, loader, verbose=False)
    assert density(module) == DENSITY


def test_an_interrupted_validation_leaves_training_weights(  # type: ignore[no-untyped-def]
    net, net_class, trainer, loader, density
) -> None:
    class Broken(net_class):  # type: ignore[misc, valid-type]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert self.trainer.sanity_checking or density(self) == DENSITY
            if not self.trainer.sanity_checking:
                raise OSError("disk")

    module = net(cls=Broken)
    with pytest.raises(OSError, match="disk"):
        trainer(CondensaCallback(Prune(DENSITY), schedule=SOFT), max_epochs=2).fit(
            module, loader, loader
        )
    assert density(module) == 1
