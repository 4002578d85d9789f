"""Batch norm statistics of θ, and that nothing else changes."""

from __future__ import annotations

import gc
import warnings
import weakref
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from launch import run_script
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_condensa import Compose, CondensaCallback, Prune, Quantize

SHORT = {"l_steps": 8}
KEPT = 3  # batches


def callback_of(
    bn_batches: int = KEPT, scheme: Any = None, preset: str = "default", **kwargs: Any
) -> CondensaCallback:
    schedule = SHORT if preset == "default" else {"steps": 8}
    scheme = scheme or Prune(0.1)
    return CondensaCallback(scheme, preset, schedule=schedule, bn_batches=bn_batches, **kwargs)


class Deep(pl.LightningModule):
    """Three hidden layers with batch norm; remembers what it was given and validated with."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [8, 32, 32, 32]
        hidden = [
            nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()) for i, o in pairwise(sizes)
        ]
        self.layers = nn.Sequential(*hidden, nn.Dropout(0.1), nn.Linear(32, 3))
        self.inputs: list[Tensor] = []
        self.losses: list[float] = []
        self.validated: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def logits(self, x: Tensor) -> Tensor:
        return self(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.inputs.append(batch[0])
        return functional.cross_entropy(self.logits(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("val_loss", loss)
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated.append({n: t.clone() for n, t in self.state_dict().items()})

    def on_validation_epoch_end(self) -> None:
        self.losses.append(float(self.trainer.callback_metrics.get("val_loss", 0)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def built(cls: type[Deep] = Deep) -> Deep:
    torch.manual_seed(0)
    return cls()


def statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if "running" in n}


def expected(module: Deep, state: dict[str, Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
    """Statistics of some weights on some inputs, the plain way."""
    twin = deepcopy(module.layers).eval()
    twin.load_state_dict({n.removeprefix("layers."): t for n, t in state.items()})
    for part in twin.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.reset_running_stats()
            part.momentum = None
            part.train()
    with torch.no_grad():
        for x in inputs:
            twin(x)
    return statistics({f"layers.{n}": t for n, t in twin.state_dict().items()})


# -- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_compressed_weights_do_better_with_their_own_statistics(  # type: ignore[no-untyped-def]
    trainer, loader, preset
) -> None:
    losses = {}
    for bn_batches in (0, KEPT):
        module = built()
        trainer(callback_of(bn_batches, preset=preset), max_epochs=8, num_sanity_val_steps=0).fit(
            module, loader, loader
        )
        losses[bn_batches] = module.losses
    assert len(losses[0]) == 8
    apart = 8 if preset == "paper" else 4  # epochs; later θ is what trains
    pairs = list(zip(losses[KEPT], losses[0], strict=True))[:apart]
    assert sum(own for own, _ in pairs) < 0.95 * sum(other for _, other in pairs)


def test_they_are_those_of_the_last_batches(trainer, loader) -> None:  # type: ignore[no-untyped-def]
    module = built()
    trainer(callback_of(), max_epochs=3, val_check_interval=2, num_sanity_val_steps=0).fit(
        module, loader, loader
    )
    for index, state in enumerate(module.validated[:4]):
        done = 2 * (index + 1)  # batches; six in an epoch
        epoch_began = (done - 1) // 6 * 6
        inputs = module.inputs[max(done - KEPT, epoch_began) : done]
        for name, value in expected(module, state, inputs).items():
            torch.testing.assert_close(statistics(state)[name], value)


@pytest.mark.parametrize("monitor", [None, "val_loss"])
def test_the_module_keeps_them_where_theta_differs_at_the_end(  # type: ignore[no-untyped-def]
    trainer, loader, monitor
) -> None:
    module = built()
    callback = callback_of(preset="paper", monitor=monitor, mode="min")
    trainer(callback, max_epochs=4, num_sanity_val_steps=0).fit(module, loader, loader)
    best = module.validated[module.losses.index(min(module.losses))]
    state = module.state_dict()
    reference = (
        expected(module, state, module.inputs[-KEPT:]) if monitor is None else statistics(best)
    )
    for name, value in statistics(state).items():
        torch.testing.assert_close(value, reference[name])


@pytest.mark.parametrize(
    "scheme", [Prune(0.3), Quantize("int8"), Compose([Prune(0.3), Quantize()])]
)
def test_they_stay_where_theta_is_what_trains(trainer, loader, scheme) -> None:  # type: ignore[no-untyped-def]
    states = []
    for bn_batches in (0, KEPT):
        module = built()
        trainer(callback_of(bn_batches, scheme), max_epochs=6).fit(module, loader, loader)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


# -- and nothing else ----------------------------------------------------------------------------


class Random(Deep):
    """Uses random numbers, and logs, in ``forward``."""

    def forward(self, x: Tensor) -> Tensor:
        noise = 0.01 * torch.randn_like(x)
        self.log("noise", noise.mean())
        return self.layers(x + noise)


@pytest.mark.parametrize("validate", [True, False])
def test_training_does_not_notice(trainer, loader, tmp_path, validate) -> None:  # type: ignore[no-untyped-def]
    results = []
    for bn_batches in (0, KEPT):
        module = built(Random)
        torch.manual_seed(1)
        saver = pl.callbacks.ModelCheckpoint(tmp_path, filename=f"{bn_batches}")
        callback = callback_of(bn_batches)
        trained = trainer(callback, saver, max_epochs=4, num_sanity_val_steps=0)
        trained.fit(module, loader, loader if validate else None)
        results.append((module.state_dict(), torch.rand(4), dict(trained.callback_metrics)))
    (first, numbers, metrics), (second, others, other_metrics) = results
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert torch.equal(numbers, others)
    assert float(metrics["noise"]) == float(other_metrics["noise"])


def test_it_leaves_no_trace(trainer, loader) -> None:  # type: ignore[no-untyped-def]
    before: dict[str, Any] = {}

    def look(module: nn.Module) -> dict[str, Any]:
        return {
            "statistics": {n: b.clone() for n, b in module.named_buffers()},
            "modes": [m.training for m in module.modules()],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
            "momenta": [getattr(m, "momentum", None) for m in module.modules()],
            "own": sorted(vars(module)),
        }

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:  # type: ignore[no-untyped-def]
            before.update(look(pl_module))

        def on_train_epoch_end(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
            after = look(pl_module)
            for name, value in before.pop("statistics").items():
                assert torch.equal(value, after["statistics"][name])
            assert all(after[key] == value for key, value in before.items())
            assert not any(after["hooks"])

    callback, module = callback_of(), built()
    trainer(callback, Look(), max_epochs=3).fit(module, loader, loader)
    inputs = [weakref.ref(x) for x in module.inputs]
    module.inputs.clear()
    gc.collect()
    assert not any(ref() is not None for ref in inputs)


def test_an_error_in_training_leaves_no_hook(trainer, loader) -> None:  # type: ignore[no-untyped-def]
    class Broken(Deep):
        def forward(self, x: Tensor) -> Tensor:
            if self.trainer.global_step == 8:
                raise OSError("disk")
            return super().forward(x)

    module = built(Broken)
    with pytest.raises(OSError, match="disk"):
        trainer(callback_of(), max_epochs=3).fit(module, loader, loader)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


# -- which calls are seen ------------------------------------------------------------------------


class Child(Deep):
    def logits(self, x: Tensor) -> Tensor:
        return self.layers(x)


class InAList(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.ModuleList([self.layers])})

    def logits(self, x: Tensor) -> Tensor:
        return self.parts["a"][0](x)


class Directly(Deep):
    def logits(self, x: Tensor) -> Tensor:
        return self.forward(x)


class Recomputed(Deep):
    """Calls its blocks again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Manual(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()
        self.optimizers().zero_grad()


@pytest.mark.parametrize("cls", [Child, InAList, Directly, Recomputed, Manual])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_calls_of_the_module_and_its_children(trainer, loader, cls, precision) -> None:  # type: ignore[no-untyped-def]
    module = built(cls)
    trainer(callback_of(), max_epochs=4, num_sanity_val_steps=0, precision=precision).fit(
        module, loader, loader
    )
    state = {n: t for n, t in module.validated[0].items() if n.startswith("layers.")}
    close = {} if precision == "32-true" else {"rtol": 0.03, "atol": 0.03}
    for name, value in expected(module, state, module.inputs[6 - KEPT : 6]).items():
        torch.testing.assert_close(state[name], value, **close)


class Functional(Deep):
    """Calls parts further down."""

    def logits(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for part in layer if isinstance(layer, nn.Sequential) else [layer]:
                x = part(x)
        return x


def test_calls_further_down_are_not_seen(trainer, loader) -> None:  # type: ignore[no-untyped-def]
    with pytest.warns(UserWarning, match=r"not seen to call self\(x\), or a child of Functional"):
        trainer(callback_of(), max_epochs=4).fit(built(Functional), loader, loader)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the compressed model has batch norm")
        trainer(callback_of(0), max_epochs=2).fit(built(Functional), loader, loader)


def test_layers_in_evaluation_mode_or_not_called_stay(trainer, loader) -> None:  # type: ignore[no-untyped-def]
    class Partly(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.BatchNorm1d(4)
            self.idle.running_mean.fill_(7.0)

        def on_train_epoch_start(self) -> None:
            self.layers[1][1].eval()

    module = built(Partly)
    trainer(callback_of(), max_epochs=2, num_sanity_val_steps=0).fit(module, loader, loader)
    fresh, state = built(Partly).state_dict(), module.validated[0]
    for name in ("layers.1.1.running_mean", "idle.running_mean", "idle.running_var"):
        assert torch.equal(state[name], fresh[name])
    assert not torch.equal(state["layers.2.1.running_mean"], fresh["layers.2.1.running_mean"])


def test_networks_without_batch_norm_are_left_alone(trainer, loader, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    class Plain(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a hook")

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", refuse)
    trainer(callback_of(), max_epochs=2).fit(built(Plain), loader, loader)


def test_the_argument_is_checked() -> None:
    with pytest.raises(ValueError, match="bn_batches must be an int >= 0, got -1"):
        callback_of(-1)


@pytest.mark.timeout(180)
@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    run_script(Path(__file__).with_name("batchnorm_worker.py"), tmp_path)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert len(first["validated"]) == 2
    for one, other in zip(first["validated"], second["validated"], strict=True):
        assert all(torch.equal(one[n], other[n]) for n in one)
    for name, value in first["expected"].items():
        mean = (value + second["expected"][name]) / 2
        torch.testing.assert_close(first["validated"][0][name], mean)
        assert not torch.equal(value, second["expected"][name])
