"""What each of Lightning's features must mean beside compression."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
)
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional

from lightning_condensa import (
    Compose,
    CondensaCallback,
    DirectCompression,
    Prune,
    Quantize,
    load_compressed,
)
from lightning_condensa.schemes.selection import SelectionError

SHORT = {"l_steps": 6}
DENSITY = 0.25


def kept(callback: CondensaCallback) -> int:
    masks = [e.mask for e in callback.compressed.theta.values()]
    return sum(int(m.sum()) for m in masks if m is not None)


# -- stopping, saving, monitoring ----------------------------------------------------------------


@pytest.mark.parametrize(("stop", "phase"), [(2, "ramp"), (7, "fine-tune")])
def test_early_stopping(net, net_class, trainer, loader, density, stop, phase) -> None:  # type: ignore[no-untyped-def]
    class Rising(net_class):  # type: ignore[misc, valid-type]
        def on_validation_epoch_end(self) -> None:
            better = self.current_epoch < stop
            self.log("val/error", -float(self.current_epoch) if better else 9.0)

    module, callback = net(cls=Rising), CondensaCallback(Prune(DENSITY), schedule=SHORT)
    stopping = EarlyStopping("val/error", patience=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained = trainer(callback, stopping, max_epochs=10)
        trained.fit(module, loader, loader)
    assert trained.current_epoch == stop + 1
    messages = [str(w.message) for w in caught]
    assert any("training stopped" in m for m in messages) == (phase == "ramp")
    assert density(module) == DENSITY
    for name, encoded in callback.compressed.theta.items():
        assert torch.equal(encoded.decode(), module.get_parameter(name))


@pytest.mark.parametrize("scheme", [Prune(DENSITY), Compose([Prune(DENSITY), Quantize("int8")])])
def test_the_best_checkpoint_has_the_metric_it_was_chosen_by(  # type: ignore[no-untyped-def]
    net, net_class, trainer, loader, tmp_path, scheme
) -> None:
    saver = ModelCheckpoint(
        tmp_path, filename="{epoch}-{val_loss}", monitor="val_loss", save_top_k=-1
    )
    whole = net("adamw")
    trainer(CondensaCallback(scheme, schedule=SHORT), saver, max_epochs=6).fit(
        whole, loader, loader
    )
    assert len(saver.best_k_models) == 6
    for file, score in saver.best_k_models.items():
        state = torch.load(file, weights_only=True)["state_dict"]
        plain = net_class("adamw")
        plain.load_state_dict(state, strict=True)
        (scores,) = trainer().validate(plain, loader, verbose=False)
        assert scores["val_loss"] == pytest.approx(float(score), rel=1e-6)

        other = net_class("adamw")
        trainer(CondensaCallback(scheme, schedule=SHORT), max_epochs=6).fit(
            other, loader, loader, ckpt_path=file
        )
        if "epoch=5" not in file:  # with it training is over
            assert all(torch.equal(t, other.state_dict()[n]) for n, t in whole.state_dict().items())


@pytest.mark.parametrize("mode", ["min", "max"])
def test_any_logged_metric_can_be_monitored(net, net_class, trainer, loader, mode) -> None:  # type: ignore[no-untyped-def]
    values = [0.5, 0.9, 0.1, 0.3]

    class Logs(net_class):  # type: ignore[misc, valid-type]
        def on_fit_start(self) -> None:
            self.states: list[dict[str, Tensor]] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0 and not self.trainer.sanity_checking:
                self.states.append({n: t.clone() for n, t in self.state_dict().items()})

        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                self.log("val/top-1/mean error", values[len(self.states) - 1])

    module = net(cls=Logs)
    callback = CondensaCallback(
        Prune(DENSITY), schedule=SHORT, monitor="val/top-1/mean error", mode=mode
    )
    trainer(callback, max_epochs=4, num_sanity_val_steps=0).fit(module, loader, loader)
    best = module.states[values.index(min(values) if mode == "min" else max(values))]
    assert all(torch.equal(t, best[n]) for n, t in module.state_dict().items())


def test_a_metric_of_training_can_be_monitored(net, net_class, trainer, loader, density) -> None:  # type: ignore[no-untyped-def]
    callback = CondensaCallback(Prune(DENSITY), schedule=SHORT, monitor="train_loss", mode="min")
    module = net()
    trainer(callback, max_epochs=4, num_sanity_val_steps=0).fit(module, loader, loader)
    assert density(module) == DENSITY


@pytest.mark.parametrize("first", [True, False])
def test_learning_rates_are_logged(net, trainer, loader, tmp_path: Path, first) -> None:  # type: ignore[no-untyped-def]
    def rates(callback: CondensaCallback, module: pl.LightningModule) -> list[float]:
        logger = CSVLogger(tmp_path, name=type(callback.schedule).__name__)
        callbacks = [callback, LearningRateMonitor("step")]
        trainer(
            *(callbacks if first else callbacks[::-1]),
            max_epochs=5,
            logger=logger,
            log_every_n_steps=1,
        ).fit(module, loader)
        rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("lr-SGD")
        return [float(v) for row in rows[1:] if (v := row.split(",")[column])]

    own = rates(CondensaCallback(Prune(DENSITY), schedule=SHORT), net(scheduler=True))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(net().configure_optimizers(), T_max=60)
    expected = []
    for _ in range(30):
        expected.append(cosine.get_last_lr()[0])
        cosine.optimizer.step()
        cosine.step()
    assert own == pytest.approx(expected)

    schedule = {"steps": 4, "lr": 0.2, "lr_end": 0.02}
    paper = CondensaCallback(Prune(DENSITY), "paper", schedule=schedule)
    at = paper.schedule.plan(30).learning_rate
    assert at is not None
    planned = [at(step) for step in range(30)]
    logged = rates(paper, net())
    # in front of us the monitor sees the rate of the step before
    assert logged == pytest.approx(planned if first else [0.1, *planned[:-1]])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_pruned_weights_do_not_count_in_clipping(  # type: ignore[no-untyped-def]
    net, net_class, trainer, loader, optimizer, algorithm
) -> None:
    norms: list[tuple[float, float]] = []

    class Clips(net_class):  # type: ignore[misc, valid-type]
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            if self.trainer.current_epoch >= 6:  # the support is settled
                pruned = [p.grad[p == 0] for p in self.parameters() if p.dim() > 1]
                assert sum(g.numel() for g in pruned) == 132
                assert not torch.cat(pruned).any()
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            grads = torch.cat([p.grad.flatten() for p in self.parameters()])
            norms.append((float(grads.norm()), float(grads.abs().max())))

    callback = CondensaCallback(Prune(DENSITY), schedule=SHORT)
    trainer(
        callback,
        max_epochs=8,
        gradient_clip_val=1e-3,
        gradient_clip_algorithm=algorithm,
    ).fit(net(optimizer, cls=Clips), loader)
    assert kept(callback) == 44
    for norm, largest in norms:  # all gradients were larger, so that all of the norm is used
        assert (norm if algorithm == "norm" else largest) == pytest.approx(1e-3, rel=1e-2)


# -- other callbacks that compress ---------------------------------------------------------------


@pytest.mark.parametrize("other", [ModelPruning("l1_unstructured"), DirectCompression(Prune(0.5))])
def test_two_callbacks_that_compress_are_an_error(net, trainer, loader, other) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="only one callback can compress the module"):
        trainer(CondensaCallback(Prune(DENSITY)), other, max_epochs=1).fit(net(), loader)


def test_two_of_ours_are_an_error(trainer) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer(CondensaCallback(Prune(0.5)), CondensaCallback(Quantize()))


# -- networks --------------------------------------------------------------------------------------


class Adversarial(pl.LightningModule):
    """A generator of numbers with a given mean and spread, and its critic."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        self.critic = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0]
        to_generate, to_judge = self.optimizers()
        judged = functional.softplus(-self.critic(x[:, :2])).mean()
        judged = judged + functional.softplus(self.critic(self.generator(x[:, 4:]).detach())).mean()
        to_judge.zero_grad()
        self.manual_backward(judged)
        to_judge.step()
        generated = functional.softplus(-self.critic(self.generator(x[:, 4:]))).mean()
        to_generate.zero_grad()
        self.manual_backward(generated)
        to_generate.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.01),
            torch.optim.Adam(self.critic.parameters(), lr=0.01),
        ]


def test_only_the_generator_is_compressed(trainer, loader) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    module = Adversarial()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    gradients: list[bool] = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # type: ignore[no-untyped-def]
            critic = pl_module.critic[0].weight
            if any(critic is p for g in optimizer.param_groups for p in g["params"]):
                gradients.append(bool(critic.grad.all()))

    callback = CondensaCallback(Prune(DENSITY, include="generator"), schedule=SHORT)
    trainer(callback, Look(), max_epochs=8).fit(module, loader)
    assert set(callback.compressed.theta) == {"generator.0.weight", "generator.2.weight"}
    assert kept(callback) == 24
    assert len(gradients) == 48
    assert all(gradients)  # no mask on the critic's
    for name, p in module.named_parameters():
        changed = p.detach() != before[name]
        assert bool(changed.any()), name
        if name.startswith("critic"):
            assert bool(changed.all() & p.all()), name


class Frozen(pl.LightningModule):
    """A backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.head = nn.Linear(16, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]


def test_a_backbone_that_thaws_is_trained_on_its_support(trainer, loader) -> None:  # type: ignore[no-untyped-def]
    seen: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
            seen.append(pl_module.backbone[0].weight.detach().clone())

    torch.manual_seed(0)
    module = Frozen()
    before = module.backbone[0].weight.detach().clone()
    callback = CondensaCallback(Prune(DENSITY, scope="layer"), schedule=SHORT)
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=4, verbose=False)
    trainer(callback, thaw, Look(), max_epochs=10).fit(module, loader)
    frozen, after = seen[3], module.backbone[0].weight.detach()
    assert bool((frozen == before)[frozen != 0].all())  # pruned, not trained
    assert int(after.count_nonzero()) == 32
    assert float((after != before)[after != 0].float().mean()) > 0.5  # trained
    assert int(module.head.weight.count_nonzero()) == 12


def test_frozen_layers_can_be_left_out(trainer, loader) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    module = Frozen()
    module.backbone.requires_grad_(False)
    before = module.backbone[0].weight.detach().clone()
    callback = CondensaCallback(Prune(DENSITY, exclude="backbone"), schedule=SHORT)
    trainer(callback, max_epochs=4).fit(module, loader)
    assert torch.equal(module.backbone[0].weight, before)
    reasons = {s.name: s.reason for s in callback.report().skipped}
    assert reasons["backbone.0.weight"] == "excluded by 'backbone'"


def test_layers_made_in_configure_model(net_class, trainer, loader, density) -> None:  # type: ignore[no-untyped-def]
    class Late(net_class):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.layers = None

        def configure_model(self) -> None:
            if self.layers is None:
                self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    torch.manual_seed(0)
    module = Late()
    trainer(CondensaCallback(Prune(DENSITY), schedule=SHORT), max_epochs=4).fit(module, loader)
    assert density(module) == DENSITY


def test_lazy_layers_must_be_run_before(net_class, trainer, loader, batches, density) -> None:  # type: ignore[no-untyped-def]
    class Lazy(net_class):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.LazyLinear(3))

    torch.manual_seed(0)
    module = Lazy()
    with pytest.raises(SelectionError, match=r"layers\.0\.weight .*run one batch through"):
        trainer(CondensaCallback(Prune(DENSITY)), max_epochs=1).fit(module, loader)
    module(batches[0][0])
    trainer(CondensaCallback(Prune(DENSITY), schedule=SHORT), max_epochs=4).fit(module, loader)
    assert density(module) == DENSITY


@pytest.mark.parametrize("change", ["replaced", "added"])
def test_layers_that_change_during_fit_are_an_error(  # type: ignore[no-untyped-def]
    net_class, net, trainer, loader, change
) -> None:
    class Changes(net_class):  # type: ignore[misc, valid-type]
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1 and change == "replaced":
                self.layers[3] = nn.Linear(16, 3)
            elif self.current_epoch == 1:
                self.extra = nn.Linear(3, 3)

    name = r"layers\.3\.weight" if change == "replaced" else r"extra\.weight"
    with pytest.raises(ValueError, match=rf"\['{name}'\] of Changes were replaced or added"):
        trainer(CondensaCallback(Prune(DENSITY), schedule=SHORT), max_epochs=4).fit(
            net(cls=Changes), loader
        )


class Silent(Frozen):
    """Logs nothing: Lightning's ``log`` cannot be compiled."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("part", ["module", "backbone"])
def test_compiled_modules(trainer, loader, tmp_path, part) -> None:  # type: ignore[no-untyped-def]
    def compiled(module: Silent) -> Any:
        if part == "module":
            return torch.compile(module, backend="eager")
        module.backbone = torch.compile(module.backbone, backend="eager")
        return module

    results = []
    for wrap in (lambda module: module, compiled):
        torch.manual_seed(0)
        scheme = Compose([Prune(DENSITY), Quantize("int8")])
        callback = CondensaCallback(scheme, schedule=SHORT)
        trainer(callback, max_epochs=4).fit(wrap(Silent()), loader)
        callback.compressed.save(tmp_path / "net.condensa")
        results.append(load_compressed(tmp_path / "net.condensa", Silent()).state_dict())
    eager, other = results
    for name, value in eager.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)
    # and the other way round
    again = Silent()
    again.backbone = torch.compile(again.backbone, backend="eager")
    load_compressed(tmp_path / "net.condensa", again)
    assert torch.equal(again.head.weight, other["head.weight"])
    assert torch.equal(
        again.backbone.get_parameter("_orig_mod.0.weight"), other["backbone.0.weight"]
    )
    own = callback.compressed.state_dict()
    assert own.keys() == callback.compressed.module.state_dict().keys()
