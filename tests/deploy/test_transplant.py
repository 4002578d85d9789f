"""An optimizer goes on with a smaller module where it was with the whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_condensa import (
    CompressedModel,
    FilterPrune,
    HeadPrune,
    HiddenPrune,
    transplant_optimizer,
)

from ..graph.networks import NETWORKS, filled, inputs_like

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
}
SCHEMES = {
    "vgg": FilterPrune(0.5, coupled=True),
    "transformer": HeadPrune(0.5),
    "gated": HiddenPrune(0.5),
}


class Training:
    """Full-batch steps in double precision; what is masked keeps its zeros."""

    def __init__(self, module: nn.Module, kind: str, example: Tensor) -> None:
        self.module = module.train()
        for part in module.modules():
            if isinstance(part, nn.Dropout | nn.MultiheadAttention):
                part.eval()  # nothing random: both have to see the same
        self.optimizer = OPTIMIZERS[kind](list(module.parameters()))
        self.inputs = inputs_like(example)

    def steps(self, count: int, masks: dict[str, Tensor] | None = None) -> list[float]:
        losses = []
        for _ in range(count):
            self.optimizer.zero_grad()
            outputs = self.module(self.inputs)
            loss = (
                (outputs - torch.linspace(-1, 1, outputs.numel()).view_as(outputs)).square().mean()
            )
            loss.backward()
            parameters = dict(self.module.named_parameters())
            for name, mask in (masks or {}).items():
                parameters[name].grad.mul_(mask)
            self.optimizer.step()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEMES)
def test_losses_are_those_of_the_masked_network(name: str, kind: str) -> None:
    build, example = NETWORKS[name]
    module = filled(build())
    module.example_input_array = example.double() if example.is_floating_point() else example
    compressed = CompressedModel.compress(module, SCHEMES[name])
    masks = {n: e.mask for n, e in compressed.theta.items() if e.mask is not None}
    whole = Training(compressed.module, kind, example)
    whole.steps(4, masks)
    smaller = compressed.shrink()
    assert smaller.plan
    small = Training(smaller.module, kind, example)
    fresh = Training(compressed.shrink().module, kind, example)
    transplant_optimizer(whole.optimizer, whole.module, small.optimizer, small.module, smaller.plan)
    expected = whole.steps(8, masks)
    found = small.steps(8)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert abs(fresh.steps(8)[-1] / expected[-1] - 1) > 1e-4  # without its state it goes elsewhere
    parameters = dict(small.module.named_parameters())
    for n, kept in smaller.plan.items():
        if n in parameters:
            left = whole.module.get_parameter(n).detach()
            for dim, indices in kept.items():
                left = left.index_select(dim, torch.tensor(indices))
            torch.testing.assert_close(parameters[n].detach(), left, rtol=1e-7, atol=1e-9)


def pair() -> tuple[nn.Module, CompressedModel]:
    net = filled(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    with torch.no_grad():
        net[2].weight[:, :2] = 0
    net.example_input_array = torch.zeros(1, 4, dtype=torch.float64)
    return net, CompressedModel(net, {}, SCHEMES["vgg"]).shrink()


def test_what_was_not_stepped_has_no_state() -> None:
    net, smaller = pair()
    source = torch.optim.Adam(net[0].parameters())
    net(torch.ones(1, 4).double()).sum().backward()
    source.step()
    target = torch.optim.Adam(smaller.module.parameters())
    transplant_optimizer(source, net, target, smaller.module, smaller.plan)
    assert set(target.state) == set(smaller.module[0].parameters())
    state = target.state[smaller.module[0].weight]
    state["exp_avg"].zero_()
    state["step"].zero_()
    assert source.state[net[0].weight]["exp_avg"].any()  # a copy
    assert source.state[net[0].weight]["step"] == 1


def test_what_does_not_fit_is_refused() -> None:
    net, smaller = pair()
    net(torch.ones(1, 4).double()).sum().backward()
    adam = torch.optim.Adam(net.parameters())
    adam.step()
    own = torch.optim.Adam(smaller.module.parameters())
    with pytest.raises(ValueError, match="must be a Adam as source is, got SGD"):
        other = torch.optim.SGD(smaller.module.parameters(), lr=1)
        transplant_optimizer(adam, net, other, smaller.module, smaller.plan)
    with pytest.raises(ValueError, match=r"plan makes \(6, 4\) of 0.weight, which smaller has as"):
        transplant_optimizer(adam, net, own, smaller.module, {})
    with pytest.raises(ValueError, match="trains one that smaller lacks"):
        transplant_optimizer(adam, net, adam, smaller.module, smaller.plan)
    factored = torch.optim.Adafactor(net.parameters())
    factored.step()
    with pytest.raises(ValueError, match=r"row_var of 0.weight .* Adafactor cannot be cut"):
        target = torch.optim.Adafactor(smaller.module.parameters())
        transplant_optimizer(factored, net, target, smaller.module, smaller.plan)
