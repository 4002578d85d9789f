"""``criterion="taylor"``: groups judged by what the loss would feel of their removal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from lightning_condensa import (
    BlockPrune,
    Compose,
    CondensaCallback,
    FilterPrune,
    HeadPrune,
    NeuronPrune,
    Prune,
    Quantize,
    Scheme,
)
from lightning_condensa.lc import LCSchedule
from lightning_condensa.lc.effects import Effects
from lightning_condensa.schemes import NotFiniteError

from .problems import Classes, Problem, Training


def removed(parameters: dict[str, nn.Parameter], masks: dict[str, Tensor]) -> float:
    """``Σ w·∂L/∂w`` over what masks mark."""
    products = {n: parameters[n].detach() * parameters[n].grad for n in masks}
    return sum(float(products[n][mask].sum()) for n, mask in masks.items())


def rows(weight: Tensor, index: int) -> Tensor:
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[index] = True
    return mask


def test_an_effect_is_the_sum_of_weight_times_gradient_over_a_group() -> None:
    problem = Classes(torch.float64)
    bound = Compose(
        [
            NeuronPrune(0.5, criterion="taylor", include="5"),
            FilterPrune(0.5, criterion="taylor", prune_bias=False),
            BlockPrune(0.5, (4, 4), criterion="taylor", include="7"),
            FilterPrune(0.5, include="0"),
        ]
    ).bind(problem.network)
    parameters = dict(problem.network.named_parameters())
    effects, sums = Effects(), [[0.0] * 16, [0.0] * 8, [0.0] * 4]
    for _ in range(3):
        problem.network.zero_grad()
        problem.x = problem.x.roll(1, 2)
        problem.loss().backward()
        effects.observe(bound, parameters, None)
        for i in range(16):
            own = {n: rows(parameters[n], i) for n in ("5.weight", "5.bias")}
            sums[0][i] += removed(parameters, own) ** 2
        for i in range(8):
            sums[1][i] += removed(parameters, {"2.weight": rows(parameters["2.weight"], i)}) ** 2
        for i in range(4):
            block = torch.zeros(4, 16, dtype=torch.bool)
            block[:, 4 * i : 4 * i + 4] = True
            sums[2][i] += removed(parameters, {"7.weight": block}) ** 2
    found = effects.take()
    assert [sorted(f) for f in found] == [["5.weight"], ["0.weight", "2.weight"], ["7.weight"], []]
    for name, stage, expected in zip(("5", "2", "7"), found, sums, strict=False):
        ours = stage[f"{name}.weight"].flatten().double()
        torch.testing.assert_close(ours, torch.tensor(expected).sqrt().double())
    assert effects.take() == []


def test_removing_a_group_changes_the_loss_by_its_effect_to_first_order() -> None:
    problem = Classes(torch.float64)
    bound = NeuronPrune(0.5, criterion="taylor", include="5").bind(problem.network)
    parameters = dict(problem.network.named_parameters())
    effects = Effects()

    def loss(network: nn.Module) -> Tensor:
        return functional.cross_entropy(network(problem.x), problem.y)

    before = loss(problem.network)
    before.backward()
    effects.observe(bound, parameters, None)
    effect = effects.take()[0]["5.weight"]
    for i in range(16):
        network = copy.deepcopy(problem.network)
        with torch.no_grad():
            network[5].weight[i] *= 1 - 1e-5
            network[5].bias[i] *= 1 - 1e-5
            change = abs(float(loss(network) - before.detach())) / 1e-5
        assert change == pytest.approx(float(effect[i]), rel=1e-2, abs=1e-7)


class Misleading(Problem):
    """Hidden units whose sizes say the contrary of their use.

    Unit 0 is large and its output is not read; the weights of unit 1 are large, feel the loss, and
    cancel, as its two inputs are the same; units 2 and 3 are small, and carry the output.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(256, 4, generator=generator)
        self.x[:, 1] = self.x[:, 0]
        self.y = self.x[:, 2:3] + 0.5 * self.x[:, 3:] - 1.2 * self.x[:, :1]
        self.network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
        with torch.no_grad():
            first, second = self.network[0].weight, self.network[1].weight
            first.copy_(torch.tensor([[3.0] * 4, [2, -2, 0, 0], [0, 0, 0.2, 0], [0, 0, 0, 0.2]]))
            first[first == 0] = 1e-3  # zeros would be taken for a start that is sparse already
            second.copy_(torch.tensor([[0.0, 2.0, 1.0, 1.0]]))

    def loss(self, weight: Tensor | None = None) -> Tensor:
        return (self.network(self.x) - self.y).square().mean()


def kept(criterion: str, importance: float) -> list[int]:
    problem = Misleading()
    scheme = NeuronPrune(0.5, criterion=criterion, include="0")
    schedule = LCSchedule(every_n_steps=4, window=3, ramp=0.5, importance=importance)
    # Hardly any training: what is kept follows from the weights above.
    train = Training(problem, scheme, schedule, optim.SGD(problem.network.parameters(), 1e-6), 12)
    train.finish()
    return problem.network[0].weight.any(1).nonzero().flatten().tolist()


def test_units_that_matter_are_kept_where_sizes_mislead() -> None:
    assert kept("l2", importance=0) == [0, 1]
    # The metric of gradients sees that unit 0 is not read, but not that unit 1 cancels.
    assert kept("l2", importance=1) != [0, 1]
    assert 0 not in kept("l2", importance=1) and 1 in kept("l2", importance=1)
    assert kept("taylor", importance=0) == [2, 3]
    assert kept("taylor", importance=1) == [2, 3]


@pytest.mark.parametrize(
    "scheme",
    [
        NeuronPrune(0.4, criterion="taylor"),
        FilterPrune(0.4, criterion="taylor", prune_bias=False),
        Compose([FilterPrune(0.4, criterion="taylor"), Prune(0.9), Quantize("int8")]),
    ],
    ids=["neuron", "filter", "composed"],
)
def test_a_run_ends_with_as_many_groups_as_asked(scheme: Scheme) -> None:
    problem = Classes()
    schedule = LCSchedule(every_n_steps=6, window=3)
    train = Training(problem, scheme, schedule, optim.SGD(problem.network.parameters(), 0.1), 60)
    train.finish()
    theta = train.c_steps[-1].theta
    _, targets = train.bound.stages[0]
    asked = round(0.4 * sum(t.shape[0] for t in targets))
    # Counted in values: zeros take no place of groups without a gradient.
    assert sum(int(theta[t.name].codes.flatten(1).any(1).sum()) for t in targets) == asked


def test_without_gradients_it_is_the_root_mean_square() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    weights = dict(network.named_parameters())
    by_size = NeuronPrune(0.5, criterion="l2").bind(network).pi(weights)
    for name, encoded in NeuronPrune(0.5, criterion="taylor").bind(network).pi(weights).items():
        assert torch.equal(encoded.decode(), by_size[name].decode())


def test_heads_are_judged_with_all_that_goes_with_them() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2)
    x = torch.randn(5, 8)
    bound = HeadPrune(0.5, criterion="taylor").bind(attention)
    parameters = dict(attention.named_parameters())
    attention(x, x, x)[0].pow(3).sum().backward()
    effects = Effects()
    effects.observe(bound, parameters, None)
    expected = []
    for head in range(2):
        own = torch.arange(24) % 8 // 4 == head
        columns = torch.zeros(8, 8, dtype=torch.bool)
        columns[:, 4 * head : 4 * head + 4] = True
        masks = {
            "in_proj_weight": own[:, None].expand(24, 8),
            "in_proj_bias": own,
            "out_proj.weight": columns,
        }
        expected.append(abs(removed(parameters, masks)))
    found = effects.take()
    torch.testing.assert_close(found[0]["in_proj_weight"], torch.tensor(expected))
    theta = bound.pi(parameters, effects=found)
    best = max(range(2), key=lambda h: expected[h])
    assert theta["out_proj.weight"].mask[0].nonzero().flatten().tolist() == list(
        range(4 * best, 4 * best + 4)
    )


def test_a_frozen_layer_counts_like_the_average_group() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].requires_grad_(False)
    bound = NeuronPrune(0.75, criterion="taylor").bind(network)
    effects = [{"0.weight": torch.tensor([0.0, 1.0, 2.0, 9.0])}]  # an average of 3
    theta = bound.pi(dict(network.named_parameters()), effects=effects)
    assert theta["0.weight"].mask[:, 0].tolist() == [False, False, True, True]
    assert theta["1.weight"].mask.all()


def test_groups_that_are_zero_go_before_those_without_an_effect() -> None:
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight[0] = 0  # its bias may have an effect
    bound = NeuronPrune(0.67, criterion="taylor").bind(layer)
    effects = [{"weight": torch.tensor([5.0, 0.0, 0.0])}]
    theta = bound.pi(dict(layer.named_parameters()), effects=effects)
    assert theta["weight"].mask[:, 0].tolist() == [False, True, True]


@pytest.mark.parametrize(
    "scheme", [NeuronPrune(0.5, criterion="taylor"), HeadPrune(0.5, criterion="taylor")]
)
def test_weights_that_diverged_are_named_whatever_their_effects_were(scheme: Scheme) -> None:
    layer = nn.Linear(3, 2) if isinstance(scheme, NeuronPrune) else nn.MultiheadAttention(4, 2)
    bound = scheme.bind(layer)
    effects = [{bound.names[0]: torch.ones(2)}]
    for name in ("weight", "bias") if isinstance(scheme, NeuronPrune) else ("out_proj.weight",):
        weights = {n: p.detach().clone() for n, p in layer.named_parameters()}
        weights[name].view(-1)[0] = torch.nan
        with pytest.raises(NotFiniteError, match=name):
            bound.pi(weights, effects=effects)


def test_gradients_that_overflow_are_harmless() -> None:
    network = nn.Linear(3, 2)
    bound = NeuronPrune(0.5, criterion="taylor").bind(network)
    effects = Effects()
    network.weight.grad, network.bias.grad = torch.full((2, 3), torch.inf), torch.ones(2)
    effects.observe(bound, dict(network.named_parameters()), None)
    assert effects.take() == []


def test_a_run_goes_on_from_its_state(tmp_path: Any) -> None:
    def training() -> Training:
        schedule = LCSchedule(every_n_steps=6, window=4, importance=0)
        problem = Classes()
        optimizer = optim.SGD(problem.network.parameters(), 0.1)
        scheme = NeuronPrune(0.4, criterion="taylor")
        return Training(problem, scheme, schedule, optimizer, 40)

    whole, first, second = training(), training(), training()
    expected = whole.finish()
    first.start()
    while first.run.step < 10:  # within the window before a C-step
        first.step()
    state = first.run.state_dict()
    assert state["engine"]["effects"][0]
    torch.save([state, first.problem.network.state_dict()], tmp_path / "state.pt")
    state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    second.problem.network.load_state_dict(weights)
    second.run.load_state_dict(state)
    restored = second.run.state_dict()["engine"]["effects"]
    assert all(torch.equal(restored[0][n], e) for n, e in state["engine"]["effects"][0].items())
    while second.run.step < 40:
        second.step()
    found = second.bound.delta(second.run.finish())
    for name, weight in expected.items():
        assert torch.equal(found[name], weight)


def test_the_published_algorithm_has_no_such_gradients() -> None:
    from lightning_condensa.callbacks.checks import check_plan
    from lightning_condensa.lc import PaperSchedule

    plan = PaperSchedule().plan(100)
    with pytest.raises(ValueError, match="criterion='taylor' judges by loss gradients"):
        check_plan(plan, NeuronPrune(0.5, criterion="taylor"), averaged=False)
    check_plan(plan, NeuronPrune(0.5), averaged=False)
    CondensaCallback(NeuronPrune(0.5, criterion="taylor"))
