"""What the default L-C does between two C-steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from lightning_condensa import Codebook, Compose, NeuronPrune, Prune, Quantize, Scheme
from lightning_condensa.lc import CStep, LCRun, LCSchedule
from lightning_condensa.schemes import Encoded
from lightning_condensa.schemes.bound import boundaries_of

from .problems import Classes, Training

Build = Callable[[Iterable[Tensor]], optim.Optimizer]

# Each treats every element on its own, and decays weights where it can.
ELEMENTWISE: dict[str, Build] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, weight_decay=1e-2),
    "nesterov": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=1e-1),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.01, weight_decay=1e-1, fused=True),
    "rmsprop": lambda p: optim.RMSprop(p, 0.01, centered=True, momentum=0.9, weight_decay=1e-2),
    "adagrad": lambda p: optim.Adagrad(
        p, lr=0.05, weight_decay=1e-2, initial_accumulator_value=0.1
    ),
    "nadam": lambda p: optim.NAdam(p, lr=0.01, weight_decay=1e-2),
    "radam": lambda p: optim.RAdam(p, lr=0.01, weight_decay=1e-2),
    "adamax": lambda p: optim.Adamax(p, lr=0.01, weight_decay=1e-2),
    "adadelta": lambda p: optim.Adadelta(p, lr=1.0, weight_decay=1e-2),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "asgd": lambda p: optim.ASGD(p, lr=0.05, weight_decay=1e-2),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.01, weight_decay=1e-2),
}


def matrices(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.dim() == 2]


# These move a weight whose gradient and state are zero.
MIXING: dict[str, Callable[[nn.Module], optim.Optimizer]] = {
    "lbfgs": lambda n: optim.LBFGS(n.parameters(), lr=0.2, max_iter=3, history_size=4),
    "8-bit": lambda n: EightBit(n.parameters()),
}
if hasattr(optim, "Muon"):
    MIXING["muon"] = lambda n: optim.Muon(matrices(n), lr=0.02)


class EightBit(optim.Optimizer):
    """Momentum in eight bits, which no factor can be multiplied into."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            state = self.state[p]
            old = (state["momentum"].float() - 128) / 128 if "momentum" in state else 0
            momentum = (0.9 * old + p.grad).clamp(-1, 0.99)
            state["momentum"] = (momentum * 128 + 128).to(torch.uint8)
            p.sub_(0.05 * momentum)


def training(scheme: Scheme, build: Build, steps: int = 40, **schedule: Any) -> Training:
    problem = Classes()
    optimizer = build(problem.network.parameters())
    return Training(problem, scheme, LCSchedule(**schedule), optimizer, steps)


def outside(c_step: CStep) -> dict[str, Tensor]:
    """What a C-step pruned."""
    return {n: ~e.mask for n, e in c_step.theta.items() if e.mask is not None}


@pytest.mark.parametrize("existing_state", [False, True])
@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize(
    "scheme", [Prune(0.3), Compose([NeuronPrune(0.5), Quantize("int8")])], ids=["p", "n+q"]
)
def test_what_is_pruned_stays_zero_and_gets_no_gradient(
    scheme: Scheme, name: str, existing_state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = training(scheme, ELEMENTWISE[name], l_steps=6)
    if existing_state:
        for _ in range(5):
            train.backward()
            train.optimizer.step()
    original, gradients = LCRun.before_step, []

    def before_step(run: LCRun, optimizer: optim.Optimizer, only_its_own: bool) -> None:
        original(run, optimizer, only_its_own)
        pruned = outside(train.c_steps[-1])
        gradients.extend(train.weights[n].grad[mask] for n, mask in pruned.items())

    monkeypatch.setattr(LCRun, "before_step", before_step)
    for _ in train.all():
        for weight_name, mask in outside(train.c_steps[-1]).items():
            assert not train.weights[weight_name][mask].any()
    assert not torch.cat(gradients).any()
    deployed = train.bound.delta(train.run.finish())
    assert any(bool((t == 0).any()) for t in deployed.values())
    if not train.bound.projects:
        assert all(torch.equal(train.weights[n], t) for n, t in deployed.items())


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("schedule", [{"l_steps": 6}, {"l_steps": 1}, {"finetune": 1.0}], ids=str)
def test_optimizers_that_move_pruned_weights_are_undone(
    name: str, schedule: dict[str, Any]
) -> None:
    problem = Classes()
    optimizer = MIXING[name](problem.network)
    # Muon trains matrices only
    scheme = Prune(0.3, types="Linear")
    train = Training(problem, scheme, LCSchedule(**schedule), optimizer, 40)
    train.start()
    for _ in range(train.steps):

        def closure() -> Tensor:
            train.backward()
            train.run.before_step(optimizer, only_its_own=False)
            return problem.loss()

        if name == "lbfgs":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        if (c_step := train.run.after_step([optimizer])) is not None:
            train.c_steps.append(c_step)
        if train.run.finetuning:
            assert not any(
                bool(train.weights[n][mask].any()) for n, mask in outside(train.c_steps[-1]).items()
            )
    theta = train.run.finish()
    assert sum(e.nnz for e in theta.values()) == round(0.3 * sum(e.numel for e in theta.values()))
    for n, encoded in theta.items():
        assert torch.equal(encoded.decode(), train.weights[n])


def test_weights_are_left_alone_by_the_engine_where_the_optimizer_keeps_zeros(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A pass over the weights after each step would cost what one over the gradients costs.
    touched: list[int] = []
    train = training(Prune(0.3), ELEMENTWISE["adam"], l_steps=6)
    original = LCRun.after_step

    def after_step(run: LCRun, optimizers: list[optim.Optimizer]) -> CStep | None:
        versions = {n: p._version for n, p in run.parameters.items()}
        c_step = original(run, optimizers)
        if c_step is None and any(p._version != versions[n] for n, p in run.parameters.items()):
            touched.append(run.step)
        return c_step

    monkeypatch.setattr(LCRun, "after_step", after_step)
    train.finish()
    assert not touched


def test_another_optimizers_gradients_are_left_alone() -> None:
    # As in a GAN: a step of one optimizer while the other one's gradients wait for theirs.
    train = training(Prune(0.3), ELEMENTWISE["sgd"], ramp=0.0)
    train.start()
    train.backward()
    first, second = train.weights["0.weight"], train.weights["2.weight"]
    train.run.before_step(optim.SGD([first], lr=0.1), only_its_own=True)
    pruned = outside(train.c_steps[0])
    assert not first.grad[pruned["0.weight"]].any()
    assert second.grad[pruned["2.weight"]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.25, 0.5, 1e-4])
def test_a_soft_pruning_rate_shrinks_by_exactly_that(rate: float, dtype: torch.dtype) -> None:
    problem = Classes(dtype)
    optimizer = optim.SGD(problem.network.parameters(), lr=0.0)
    schedule = LCSchedule(every_n_steps=20, prune_rate=rate, ramp=0.0, finetune=0.25)
    train = Training(problem, Prune(0.3), schedule, optimizer, 40)
    # What rounds to 1 in a narrow type would prune nothing.
    factor = torch.tensor(1 - max(rate, torch.finfo(dtype).eps), dtype=dtype)
    train.start()
    before = {n: w.detach().clone() for n, w in train.weights.items()}
    for _ in range(19):
        assert train.step() is None
        for name, mask in outside(train.c_steps[0]).items():
            before[name][mask] *= factor
            assert torch.equal(train.weights[name], before[name])
    while train.run.step < train.steps:
        train.step()
    theta = train.run.finish()
    assert sum(e.nnz for e in theta.values()) == round(0.3 * sum(e.numel for e in theta.values()))
    # In fine-tuning nothing shrinks any more: what is pruned is out.
    assert all(torch.equal(e.decode(), train.weights[n]) for n, e in theta.items())


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_rounded_values_are_reached_by_way_of_a_latent_weight(
    first: float, second: float, seed: int
) -> None:
    torch.manual_seed(seed)
    network = nn.Linear(5, 4, bias=False).double()
    bound = Quantize("int4").bind(network)
    schedule = LCSchedule(l_steps=2, rate_start=first, rate_end=second)
    run = LCRun(bound, schedule.plan(4, prunes=False, projects=True), {"weight": network.weight})
    u = network.weight.detach().clone()
    delta = run.start().theta["weight"].decode()
    torch.testing.assert_close(delta, bound.pi({"weight": u})["weight"].decode())
    torch.testing.assert_close(network.weight.detach(), u.lerp(delta, first))
    for rate in (second, second):  # the last C-step has the last rate, too
        for _ in range(2):
            move = 0.1 * torch.randn(4, 5, dtype=torch.float64)
            with torch.no_grad():
                network.weight += move  # the optimizer's step
            u += move
            torch.testing.assert_close(run.latent({"weight": network.weight})["weight"], u)
            c_step = run.after_step([])
        assert c_step is not None
        delta = c_step.theta["weight"].decode()
        torch.testing.assert_close(delta, bound.pi({"weight": u})["weight"].decode())
        torch.testing.assert_close(network.weight.detach(), u.lerp(delta, rate))
    torch.testing.assert_close(run.finish()["weight"].decode(), delta)
    average = torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        network.weight.copy_(average)
    expected = bound.pi({"weight": average})["weight"].decode()
    assert torch.equal(run.finish(averaged=True)["weight"].decode(), expected)


def with_outliers(scheme: Scheme) -> tuple[Tensor, Tensor, Encoded]:
    """A weight that grows outliers between two C-steps.

    Returns:
        The latent weight before the second C-step and after it, and its θ.
    """
    torch.manual_seed(0)
    network = nn.Linear(40, 9, bias=False)
    bound = scheme.bind(network)
    plan = LCSchedule(l_steps=3, rate_start=0.5, ramp=0.0, finetune=0.0).plan(
        3, prunes=bound.prunes, projects=True, rounds=True
    )
    run = LCRun(bound, plan, {"weight": network.weight})
    run.start()
    with torch.no_grad():
        network.weight[:, 0] += 0.2 * 1.5 ** torch.arange(9) * network.weight[:, 0].sign()
    before = run.latent({"weight": network.weight})["weight"].clone()
    c_step = run.after_step([])
    assert c_step is not None
    (theta,) = c_step.theta["weight"].leaves
    weight = network.weight.detach()
    after = run.latent({"weight": weight})["weight"]
    torch.testing.assert_close(weight, after.lerp(theta.decode(), plan.rounding[1]))
    return before, after, theta


@pytest.mark.parametrize(
    ("dtype", "low", "high", "more"),
    [
        ("binary", -3, 3, {}),
        ("binary", -3, 3, {"granularity": "group:4"}),
        ("ternary", -2, 2, {}),
        ("ternary", -2, 2, {"granularity": "tensor"}),
        ("int2", -3, 2, {"symmetric": False}),
        ("int4", -8, 8, {}),
    ],
)
def test_latent_weights_stay_within_a_step_beyond_the_codes(
    dtype: str, low: int, high: int, more: dict[str, Any]
) -> None:
    before, after, theta = with_outliers(Quantize(dtype, **more))
    assert theta.scale is not None
    units = theta.scale.repeat_interleave(theta.group or 1, dim=1)
    torch.testing.assert_close(after / units, (before / units).clamp(low, high))
    if more.get("symmetric", dtype != "int4"):  # else the scale fits the outliers
        assert not torch.equal(after, before)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_latent_weights_stay_where_the_next_entries_would_be(k: int) -> None:
    before, after, theta = with_outliers(Codebook(k))
    values = theta.codes.unique()
    ends = 2 * values[0] - values[1], 2 * values[-1] - values[-2]
    torch.testing.assert_close(after, before.clamp(*ends))
    assert not torch.equal(after, before)


def test_what_is_pruned_stays_zero_also_where_all_values_lie_on_one_side() -> None:
    network = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        network.weight.copy_(1 + torch.arange(24.0).view(4, 6) % 5)
    bound = Compose([Prune(0.5), Codebook(2)]).bind(network)
    plan = LCSchedule(l_steps=2, ramp=0.0).plan(9, prunes=True, projects=True, rounds=True)
    run = LCRun(bound, plan, {"weight": network.weight})
    theta = run.start().theta["weight"]
    assert theta.decode().unique().tolist()[1] > 2
    assert theta.mask is not None
    assert not network.weight[~theta.mask].any()


def test_latent_weights_of_float8_have_no_limits() -> None:
    network = nn.Linear(6, 4, bias=False)
    bound = Quantize("float8_e4m3fn").bind(network)
    plan = LCSchedule(l_steps=3).plan(3, prunes=False, projects=True, rounds=True)
    run = LCRun(bound, plan, {"weight": network.weight})
    run.start()
    with torch.no_grad():
        network.weight[:, 0] += 9
    latent = run.latent({"weight": network.weight})["weight"].clone()
    run.after_step([])
    torch.testing.assert_close(run.latent({"weight": network.weight})["weight"], latent)


def test_values_that_are_only_pruned_are_not_moved() -> None:
    # Of a fixed support the best values are those that training finds.
    scheme = Compose([NeuronPrune(0.5), Quantize("int8", include=r"5\.weight")])
    start = {n: w.detach().clone() for n, w in Classes().network.named_parameters()}
    train = training(scheme, lambda p: optim.SGD(p, lr=0.0), l_steps=1, ramp=0.0, rate_start=0.5)
    train.start()
    theta = train.c_steps[0].theta
    for name in ("7.weight", "5.bias", "7.bias", "5.weight"):
        kept = theta[name].mask
        assert kept is not None
        expected = start[name]
        if name == "5.weight":
            expected = expected.lerp(theta[name].decode(), 0.5)
        torch.testing.assert_close(train.weights[name][kept], expected[kept])
        assert not train.weights[name][~kept].any()


@pytest.mark.parametrize("scheme", [Codebook(2), Quantize("ternary")], ids=["codebook", "ternary"])
def test_boundaries_of_rounding_are_kept_from_the_first_c_step(scheme: Scheme) -> None:
    train = training(scheme, ELEMENTWISE["sgd"], l_steps=8)
    list(train.all())
    first = boundaries_of(train.c_steps[0].theta)
    assert set(first) == set(train.bound.names)
    for c_step in train.c_steps[1:]:
        found = boundaries_of(c_step.theta)
        assert all(torch.equal(found[n], b) for n, b in first.items())
    values = [c.theta["5.weight"].decode().unique() for c in train.c_steps]
    assert not torch.equal(values[0], values[-1])  # these are free


def test_boundaries_follow_the_weights_until_it_is_settled_which_are_pruned() -> None:
    scheme = Compose([Prune(0.25), Codebook(3)])
    train = training(scheme, ELEMENTWISE["sgd"], l_steps=6, finetune=0.5)
    list(train.all())
    end = train.plan.c_steps.index(train.plan.l_end)
    found = [boundaries_of(c.theta)["5.weight"] for c in train.c_steps]
    assert len({tuple(b.tolist()) for b in found[: end + 1]}) > 1
    assert len({tuple(b.tolist()) for b in found[end + 1 :]}) == 1


def test_theta_stays_as_it_was() -> None:
    # A cast to the type the weights already have must not make Δ(θ) an alias of them.
    network = nn.Linear(4, 3, bias=False).to(torch.bfloat16)
    bound = Quantize("bfloat16").bind(network)
    plan = LCSchedule(l_steps=1, rate_start=0.5).plan(9, prunes=False, projects=True)
    run = LCRun(bound, plan, {"weight": network.weight})
    before = network.weight.detach().clone()
    theta = run.start().theta["weight"]
    with torch.no_grad():
        network.weight.zero_()
    run.after_step([])
    assert torch.equal(theta.decode(), before)


def test_clipping_sees_no_gradient_of_what_is_pruned() -> None:
    train = training(Prune(0.05), ELEMENTWISE["sgd"], ramp=0.0)
    train.start()
    train.backward()
    gradients = {n: train.weights[n].grad for n in train.bound.names}
    kept = {n: e.mask for n, e in train.c_steps[0].theta.items()}
    expected = nn.utils.get_total_norm([g[kept[n]] for n, g in gradients.items()])
    assert expected < 0.9 * nn.utils.get_total_norm(gradients.values())
    train.run.before_step(train.optimizer, only_its_own=False)
    torch.testing.assert_close(nn.utils.get_total_norm(gradients.values()), expected)


def test_optimizers_keep_what_they_know_of_weights_that_are_kept() -> None:
    train = training(Prune(0.5), ELEMENTWISE["adam"], l_steps=2)
    states: list[dict[str, Tensor]] = []
    for c_step in train.all():
        moments = {
            n: train.optimizer.state[train.weights[n]]["exp_avg"].clone() for n in train.bound.names
        }
        if c_step is not None and train.run.step == train.plan.c_steps[1]:
            for name, mask in outside(c_step).items():
                assert not moments[name][mask].any()
                assert moments[name][~mask].any()
                # Without a first moment it moves nothing, and zeros would make its root slow.
                second = train.optimizer.state[train.weights[name]]["exp_avg_sq"]
                assert (second[mask] > 0).any()
        states.append(moments)
    steps = {float(s["step"]) for s in train.optimizer.state.values()}
    assert steps == {40.0}  # a counter is no moment


@pytest.mark.parametrize("reset", [False, True])
def test_the_optimizers_state_is_forgotten_only_where_asked(reset: bool) -> None:
    train = training(Prune(0.5), ELEMENTWISE["adam"], l_steps=2, reset_optimizer=reset)
    for c_step in train.all():
        assert bool(train.optimizer.state) != (reset and c_step is not None)
