"""The learning rate under sparsity: what the optimizer uses, and what everything else sees."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_condensa import CondensaCallback, Prune, Quantize

EPOCHS = 4


class Spied(torch.optim.SGD):
    """Notes the learning rates that steps are made at."""

    def __init__(self, *args: Any, fail_at: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.used: list[list[float]] = []
        self.fail_at = fail_at

    def step(self, closure: Any = None) -> Any:
        self.used.append([group["lr"] for group in self.param_groups])
        if len(self.used) == self.fail_at:
            raise RuntimeError("out of memory")
        return super().step(closure)


class Rates(pl.Callback):
    """Notes the learning rates between steps, and the factor that L-C asks for."""

    def __init__(self, lc: CondensaCallback) -> None:
        self.lc = lc
        self.seen: list[float] = []
        self.factors: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        assert self.lc._run is not None
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.factors.append(self.lc._run.lr_factor)


def run(net: Any, trainer: Any, loader: Any, scheme: Any, **schedule: Any) -> tuple[Any, Any]:
    module = net("sgd", scheduler=True)
    optimizer = Spied(
        [
            {"params": [p for p in module.parameters() if p.dim() > 1]},
            {"params": [p for p in module.parameters() if p.dim() == 1]},
        ],
        lr=0.1,
        momentum=0.9,
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * len(loader))
    scheduler = {"scheduler": cosine, "interval": "step"}
    module.configure_optimizers = lambda: {"optimizer": optimizer, "lr_scheduler": scheduler}
    lc = CondensaCallback(scheme, schedule={"l_steps": 5, **schedule})
    rates = Rates(lc)
    trainer(lc, rates, max_epochs=EPOCHS).fit(module, loader)
    return optimizer, rates


def cosine(steps: int) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_steps_are_longer_where_the_network_is_sparse(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    optimizer, rates = run(net, trainer, loader, Prune(0.05), lr_exponent=0.5)
    own = cosine(EPOCHS * len(loader))
    assert rates.seen == own  # schedulers and monitors see the user's
    for used, lr, factor in zip(optimizer.used, own, rates.factors, strict=True):
        assert used == pytest.approx([lr * factor, lr])  # nothing of the other group is pruned
    assert rates.factors[0] == 1
    kept = round(0.05 * net().weights)
    assert rates.factors[-1] == pytest.approx((kept / net().weights) ** -0.5)
    assert rates.factors == sorted(rates.factors)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("scheme", "schedule"), [(Prune(0.05), {"lr_exponent": 0.0}), (Quantize("int8"), {})]
)
def test_the_users_own_without(net, trainer, loader, scheme, schedule) -> None:  # type: ignore[no-untyped-def]
    optimizer, _ = run(net, trainer, loader, scheme, **schedule)
    assert [used[0] for used in optimizer.used] == cosine(EPOCHS * len(loader))


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_the_exponent_is_checked(value: float) -> None:
    with pytest.raises(ValueError, match="lr_exponent"):
        CondensaCallback(Prune(0.5), schedule={"lr_exponent": value})


def test_a_step_that_fails_leaves_the_users_rate(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    module = net()
    optimizer = Spied(module.parameters(), lr=0.1, fail_at=20)
    module.configure_optimizers = lambda: optimizer
    lc = CondensaCallback(Prune(0.05), schedule={"l_steps": 5})
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(lc, max_epochs=EPOCHS).fit(module, loader)
    assert optimizer.used[-1][0] > 0.1
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_without_a_learning_rate(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": None})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure()
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(0.05 * parameter.grad)
            return loss

    module = net()
    module.configure_optimizers = lambda: Own(module.parameters())
    lc = CondensaCallback(Prune(0.2), schedule={"l_steps": 5})
    trainer(lc, max_epochs=2).fit(module, loader)
    assert lc.compressed.theta["layers.0.weight"].nnz > 0
