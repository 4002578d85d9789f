"""``preset="paper"`` against the published loop, written out in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from lightning_condensa import Compose, CondensaCallback, NeuronPrune, Prune, Quantize, Scheme

FIRST, PER_L = 9, 5
MU, GROWTH = 0.05, 1.5
LR, LR_END, DECAY = 0.05, 0.01, 0.9


def published_loop(module, batches, scheme: Scheme, steps: int):  # type: ignore[no-untyped-def]
    bound = scheme.bind(module)
    weights = {n: p for n, p in module.named_parameters() if n in bound.names}
    theta = bound.delta(bound.pi(weights))
    lam = {n: torch.zeros_like(t) for n, t in theta.items()}
    mu, batch = MU, 0
    for iteration in range(1, steps):
        optimizer = torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9, nesterov=True)
        length = FIRST if iteration == 1 else PER_L
        start = LR * DECAY**iteration
        for i in range(length):
            optimizer.param_groups[0]["lr"] = start * (LR_END / start) ** (i / length)
            x, y = batches[batch % len(batches)]
            batch += 1
            optimizer.zero_grad()
            functional.cross_entropy(module(x), y).backward()
            for n, w in weights.items():
                w.grad += mu * (w.detach() - theta[n]) - lam[n]
            optimizer.step()
        theta = bound.delta(bound.pi({n: w.detach() - lam[n] / mu for n, w in weights.items()}))
        lam = {n: lam[n] - mu * (w.detach() - theta[n]) for n, w in weights.items()}
        mu *= GROWTH
    return theta


@pytest.mark.parametrize("steps", [2, 6])  # up to the first C-step after training, and the fifth
@pytest.mark.parametrize(
    "scheme",
    [
        Prune(0.2),
        Prune(0.3, scope="layer"),
        NeuronPrune(0.5),
        Compose([Prune(0.3), Quantize("float16")]),
    ],
    ids=lambda s: s.describe(),
)
def test_same_theta_as_the_published_loop(  # type: ignore[no-untyped-def]
    net, trainer, loader, batches, scheme: Scheme, steps: int
) -> None:
    module = net("nesterov")
    expected = published_loop(copy.deepcopy(module), batches, scheme, steps)
    callback = CondensaCallback(
        scheme,
        preset="paper",
        schedule={
            "steps": steps,
            "mb_iterations_first_l": FIRST,
            "mb_iterations_per_l": PER_L,
            "lr": LR,
            "lr_end": LR_END,
            "lr_decay": DECAY,
            "mu_init": MU,
            "mu_multiplier": GROWTH,
        },
    )
    trainer(callback, max_steps=FIRST + (steps - 2) * PER_L, max_epochs=-1).fit(module, loader)
    parameters = dict(module.named_parameters())
    for name, theta in expected.items():
        torch.testing.assert_close(parameters[name].detach(), theta, rtol=1e-4, atol=1e-6)
        assert torch.equal(parameters[name].detach() != 0, theta != 0)
        assert torch.equal(callback.compressed.theta[name].decode(), parameters[name].detach())
