"""CondensaCallback in a Trainer: what holds after ``fit``, whatever the training looks like."""

from __future__ import annotations

import gc
import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional

from lightning_condensa import (
    Compose,
    CondensaCallback,
    FilterPrune,
    LowRank,
    NeuronPrune,
    Prune,
    Quantize,
    Range,
)
from lightning_condensa.schemes.finite import NotFiniteError

SHORT = {"l_steps": 6}


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        self.values.append(float(outputs["loss"]))


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_matrix(net, trainer, loader, c_steps, optimizer, accumulate, precision, clip) -> None:  # type: ignore[no-untyped-def]
    module, callback, losses = (
        net(optimizer),
        CondensaCallback(Prune(0.17), schedule=SHORT),
        Losses(),
    )
    trainer(
        callback,
        losses,
        max_epochs=8,
        accumulate_grad_batches=accumulate,
        precision=precision,
        gradient_clip_val=clip,
    ).fit(module, loader)
    kept = round(0.17 * module.weights)
    compressed = callback.compressed
    assert sum(e.nnz for e in compressed.theta.values()) == kept
    parameters = dict(module.named_parameters())
    assert set(compressed.theta) == {"layers.0.weight", "layers.3.weight"}
    for name, encoded in compressed.theta.items():
        assert torch.equal(encoded.decode(), parameters[name].detach())
    assert all(p.dtype == torch.float32 for p in parameters.values())
    assert all(math.isfinite(v) for v in losses.values)
    assert losses.values[-1] < losses.values[0]
    steps = 8 * 6 // accumulate
    assert c_steps == list(callback.schedule.plan(steps).c_steps)
    assert len(c_steps) == 7
    assert callback.report() is not None


def test_accumulation_that_does_not_divide_the_epoch(net, trainer, loader, c_steps) -> None:  # type: ignore[no-untyped-def]
    callback = CondensaCallback(Prune(0.2), schedule=SHORT)
    trainer(callback, max_epochs=6, accumulate_grad_batches=4).fit(net(), loader)
    assert c_steps == list(callback.schedule.plan(12).c_steps)  # two steps an epoch


def test_training_is_the_users_own_while_rates_are_tiny(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    plain, ours = net("adamw"), net("adamw")
    trainer(max_epochs=2).fit(plain, loader)
    seen: dict[str, torch.Tensor] = {}

    class Weights(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:  # type: ignore[no-untyped-def]
            seen.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    schedule = {"l_steps": 4, "finetune": 0.0, "prune_rate": 1e-12}
    # Before the callback, which leaves θ in the module after the last step.
    callbacks = Weights(), CondensaCallback(Prune(0.2), schedule=schedule)
    trainer(*callbacks, max_epochs=2).fit(ours, loader)
    for n, p in plain.named_parameters():
        if n != "layers.0.bias":  # batch norm follows: its gradient is noise
            torch.testing.assert_close(seen[n], p.detach(), rtol=1e-4, atol=1e-5)


class Conv(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 12, 3), nn.ReLU(), nn.Conv1d(12, 8, 3), nn.Flatten(), nn.Linear(32, 3)
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return functional.cross_entropy(self.layers(x.unsqueeze(1)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def test_filters_go_with_their_biases(trainer, loader) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    module, callback = Conv(), CondensaCallback(FilterPrune(0.4), schedule=SHORT)
    trainer(callback, max_epochs=6).fit(module, loader)
    kept = 0
    for layer in (module.layers[0], module.layers[2]):
        alive = layer.weight.detach().flatten(1).any(1)
        assert bool(layer.weight.detach().flatten(1)[alive].all())
        assert not layer.bias.detach()[~alive].any()
        kept += int(alive.sum())
    assert kept == 8
    assert module.layers[4].weight.detach().all()


def test_quantize_only(net, trainer, loader, batches) -> None:  # type: ignore[no-untyped-def]
    module, callback = net(), CondensaCallback(Quantize("int8"), schedule=SHORT)
    trainer(callback, max_epochs=8).fit(module, loader)
    theta = callback.compressed.theta
    assert all(e.codes.dtype == torch.int8 for e in theta.values())
    assert max(len(row.unique()) for row in module.layers[0].weight.detach()) <= 8
    loss = sum(float(functional.cross_entropy(module.train()(x), y)) for x, y in batches) / 6
    assert loss < 0.6


def test_prune_and_quantize(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    module = net("adamw")
    callback = CondensaCallback(Compose([Prune(0.25), Quantize("int8")]), schedule=SHORT)
    trainer(callback, max_epochs=8).fit(module, loader)
    theta = callback.compressed.theta
    kept = sum(int(e.mask.sum()) for e in theta.values() if e.mask is not None)
    assert kept == round(0.25 * module.weights)
    assert all(not e.codes[~e.mask].any() for e in theta.values())
    assert sum(e.nnz for e in theta.values()) <= kept  # int8 may round a survivor to zero
    for name, p in module.named_parameters():
        if name in theta:
            assert torch.equal(theta[name].decode(), p.detach())


def test_frozen_layers_are_projected_too(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    module = net()
    module.layers[0].requires_grad_(False)
    before = module.layers[0].weight.detach().clone()
    callback = CondensaCallback(Prune(0.25, scope="layer"), schedule={"l_steps": 20})
    trainer(callback, max_epochs=10).fit(module, loader)
    after = module.layers[0].weight.detach()
    assert int(after.count_nonzero()) == 32
    kept = after != 0
    torch.testing.assert_close(after[kept], before[kept])
    assert before[kept].abs().min() >= before[~kept].abs().max()


class Adversarial(pl.LightningModule):
    """Two networks with an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(8, 8, bias=False)
        self.critic = nn.Linear(8, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        first, second = self.optimizers()
        for optimizer, sign in ((first, -1.0), (second, 1.0)):
            optimizer.zero_grad()
            score = self.critic(self.generator(x))
            loss = sign * (score.tanh().mean() - self.critic(x).tanh().mean())
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.01),
            torch.optim.SGD(self.critic.parameters(), lr=0.01),
        ]


@pytest.mark.parametrize("include", [(), "generator", "critic"])
def test_two_optimizers(trainer, loader, c_steps, include) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    module = Adversarial()
    callback = CondensaCallback(Prune(0.25, scope="layer", include=include), schedule=SHORT)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training stopped")
        trainer(callback, max_epochs=6).fit(module, loader)
    generator, critic = (int(m.weight.count_nonzero()) for m in (module.generator, module.critic))
    assert generator == (64 if include == "critic" else 16)
    assert critic == (8 if include == "generator" else 2)
    assert all(p.isfinite().all() for p in module.parameters())
    assert c_steps == list(callback.schedule.plan(36).c_steps)


def test_parameters_unused_in_some_steps(net_class, net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    class Branch(net_class):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.spare, self.never = nn.Linear(8, 3), nn.Linear(8, 3)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx % 2:
                return loss
            return loss + functional.cross_entropy(self.spare(batch[0]), batch[1])

    module = net(cls=Branch)
    trainer(CondensaCallback(Prune(0.25, scope="layer"), schedule=SHORT), max_epochs=6).fit(
        module, loader
    )
    for layer in (module.spare, module.never):
        assert int(layer.weight.count_nonzero()) == 6


def test_layers_that_share_a_weight(net_class, net, trainer, loader, tmp_path) -> None:  # type: ignore[no-untyped-def]
    class Tied(net_class):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(self.second(self.first(x).relu()))

    module = net(cls=Tied)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callback = CondensaCallback(Prune(0.25), schedule=SHORT)
    trainer(saver, callback, max_epochs=4).fit(module, loader)
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["first.weight"], state["second.weight"])
    fresh = Tied()
    fresh.load_state_dict(state)
    kept = sum(int(p.count_nonzero()) for n, p in fresh.named_parameters() if p.dim() > 1)
    assert kept == round(0.25 * (module.weights + 64))


def test_divergence_is_an_error(net_class, net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    class Diverging(net_class):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.global_step > 10 else loss

    with pytest.raises(NotFiniteError, match=r"layers\.0\.weight .*diverged"):
        trainer(CondensaCallback(Prune(0.2), schedule=SHORT), max_epochs=6).fit(
            net(cls=Diverging), loader
        )


def test_an_endless_run_is_an_error(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="set max_epochs or max_steps"):
        trainer(CondensaCallback(Prune(0.2)), max_epochs=-1).fit(net(), loader)


def test_no_optimizer_is_an_error(net_class, net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    class Without(net_class):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(ValueError, match="needs an optimizer"):
        trainer(CondensaCallback(Prune(0.2)), max_epochs=1).fit(net(cls=Without), loader)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="scheme must be a scheme"):
        CondensaCallback(0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be 'min' or 'max', got 'up'"):
        CondensaCallback(Prune(0.1), mode="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="preset must be"):
        CondensaCallback(Prune(0.1), preset="fast")  # type: ignore[arg-type]


def test_open_dimensions_and_dead_layers_are_errors_before_training(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="open dimensions"):
        trainer(CondensaCallback(Prune(Range(0.1, 0.5))), max_epochs=1).fit(net(), loader)
    with pytest.raises(ValueError, match=r"keeps 1 of 176"):
        trainer(CondensaCallback(Prune(0.004)), max_epochs=1).fit(net(), loader)


def test_no_result_before_fit() -> None:
    with pytest.raises(RuntimeError, match=r"run trainer\.fit first"):
        _ = CondensaCallback(Prune(0.1)).compressed


def test_an_early_stop_warns_and_is_still_exact(net, trainer, loader, density) -> None:  # type: ignore[no-untyped-def]
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args: Any) -> None:  # type: ignore[no-untyped-def]
            trainer.should_stop = trainer.global_step >= 7

    module = net()
    with pytest.warns(UserWarning, match=r"training stopped after \d+ optimizer steps, in the L-C"):
        trainer(CondensaCallback(Prune(0.125)), Stop(), max_epochs=5).fit(module, loader)
    assert density(module) == 0.125


def test_max_steps_counts_as_the_whole_run(net, trainer, loader, density, c_steps) -> None:  # type: ignore[no-untyped-def]
    module = net()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training stopped")
        trainer(CondensaCallback(Prune(0.125), schedule=SHORT), max_steps=11).fit(module, loader)
    assert density(module) == 0.125
    assert len(c_steps) == 7


@pytest.mark.parametrize(
    ("scheme", "longest"), [(Quantize("binary"), 8), (LowRank(rank=2), 9), (Prune(0.5), 7)]
)
def test_weights_that_are_rounded_are_so_often(
    net, trainer, loader, c_steps, scheme, longest
) -> None:  # type: ignore[no-untyped-def]
    trainer(CondensaCallback(scheme), max_steps=540).fit(net(), loader)
    assert max(b - a for a, b in pairwise(c_steps)) == longest


@pytest.mark.parametrize("arguments", [{"fast_dev_run": True}, {"max_steps": 1}])
def test_the_shortest_run(net, trainer, loader, density, arguments) -> None:  # type: ignore[no-untyped-def]
    module = net()
    trainer(CondensaCallback(Prune(0.125)), **arguments).fit(module, loader, loader)
    assert density(module) == 0.125


def test_a_callback_can_be_used_again(net, trainer, loader, density) -> None:  # type: ignore[no-untyped-def]
    callback = CondensaCallback(Prune(0.25), schedule=SHORT)
    first, second = net(), net()
    trainer(callback, max_epochs=4).fit(first, loader)
    kept = {n: p.detach().clone() for n, p in first.named_parameters()}
    trainer(callback, max_epochs=4).fit(second, loader)
    for n, p in second.named_parameters():
        assert torch.equal(p.detach(), kept[n])
    assert callback.compressed.module is second


def test_a_scheme_with_a_function_trains_and_saves(net, trainer, loader, tmp_path) -> None:  # type: ignore[no-untyped-def]
    def criterion(magnitudes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return magnitudes.square().sum(1)

    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="last")
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    scheme = NeuronPrune(0.5, criterion=criterion)
    module = net()
    trainer(CondensaCallback(scheme, schedule=SHORT), saver, max_epochs=2, logger=logger).fit(
        module, loader
    )
    again = CondensaCallback(scheme, schedule=SHORT)
    trainer(again, max_epochs=3).fit(net(), loader, ckpt_path=tmp_path / "last.ckpt")
    assert again.compressed.theta


class TensorCount(pl.Callback):
    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step not in (20, 110):
            return
        gc.collect()
        self.counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))


def test_memory_does_not_grow_with_c_steps(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    count = TensorCount()
    schedule = {"l_steps": 110, "finetune": 0.0}
    callback = CondensaCallback(Compose([Prune(0.2), Quantize("int8")]), schedule=schedule)
    trainer(callback, count, max_steps=110, max_epochs=-1).fit(net(), loader)
    before, after = count.counts
    assert after <= before


def test_float16_gradients_of_a_fused_optimizer_are_unscaled(
    net_class, net, trainer, loader
) -> None:  # type: ignore[no-untyped-def]
    scaled, plain = [], []

    class Fused(net_class):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)

    class Norms(pl.Callback):
        def __init__(self, norms: list[float]) -> None:
            self.norms = norms

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # type: ignore[no-untyped-def]
            grads = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            self.norms.append(float(torch.cat(grads).norm()))

    precision = pl.plugins.MixedPrecision("bf16-mixed", "cpu")
    for norms, plugin in ((plain, precision), (scaled, _float16())):
        callback = CondensaCallback(Prune(0.3), schedule={**SHORT, "finetune": 0.0})
        trainer(callback, Norms(norms), max_epochs=2, plugins=[plugin]).fit(net(cls=Fused), loader)
    assert scaled == pytest.approx(plain, rel=0.1, abs=0.02)


def _float16() -> pl.plugins.MixedPrecision:
    return pl.plugins.MixedPrecision(
        "16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)
    )
