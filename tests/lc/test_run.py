"""The state machine on problems small enough to know the answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_condensa import Compose, NeuronPrune, Prune, Quantize, Scheme
from lightning_condensa.lc import CStep, LCRun, LCSchedule, PaperSchedule, Schedule, Support


class Problem:
    """Least squares ``‖Xw − y‖²/n`` for a w with ``k`` non-zeros."""

    def __init__(self, seed: int = 0, n: int = 200, d: int = 20, k: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, d, generator=generator)
        self.truth = torch.zeros(1, d)
        support = torch.randperm(d, generator=generator)[:k]
        signs = torch.randint(0, 2, (k,), generator=generator) * 2.0 - 1
        self.truth[0, support] = signs * (0.5 + torch.rand(k, generator=generator))
        noise = 0.05 * torch.randn(n, 1, generator=generator)
        self.y = self.x @ self.truth.T + noise
        torch.manual_seed(seed)
        self.network = nn.Linear(d, 1, bias=False)
        self.k = k

    def loss(self, weight: Tensor) -> Tensor:
        return (self.x @ weight.T - self.y).square().mean()

    def least_squares_on_truth(self) -> float:
        columns = self.truth[0] != 0
        solution = torch.linalg.lstsq(self.x[:, columns], self.y).solution
        weight = torch.zeros_like(self.truth)
        weight[0, columns] = solution[:, 0]
        return float(self.loss(weight))


def solve(
    problem: Problem,
    scheme: Scheme,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> tuple[LCRun, list[CStep], Tensor]:
    bound = scheme.bind(problem.network)
    run = LCRun(bound, schedule.plan(steps), dict(problem.network.named_parameters()))
    c_steps = [run.start()]
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(problem.network.weight).backward()
        run.before_step(optimizer, only_its_own=False)
        optimizer.step()
        if (c_step := run.after_step([optimizer])) is not None:
            c_steps.append(c_step)
    return run, c_steps, run.project(run.parameters)["weight"].decode()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam"])
@pytest.mark.parametrize(
    "schedule",
    [
        LCSchedule(l_steps=30),
        LCSchedule(l_steps=30, multipliers=False),
        LCSchedule(l_steps=30, finetune=0.0, ramp=0.5),
        PaperSchedule(steps=30, mu_init=0.05, mu_multiplier=1.2),
    ],
    ids=["default", "penalty", "no finetune", "paper"],
)
def test_sparse_least_squares(schedule: Schedule, name: str, seed: int) -> None:
    problem = Problem(seed)
    parameters = problem.network.parameters()
    optimizer: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.05),
        "nesterov": lambda: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True),
        "adam": lambda: torch.optim.Adam(parameters, lr=0.01),
    }[name]()
    run, c_steps, theta = solve(problem, Prune(problem.k / 20), schedule, optimizer, 900)
    assert int(theta.count_nonzero()) == problem.k  # feasible
    assert torch.equal(theta != 0, problem.truth != 0)
    assert float(problem.loss(theta)) < 1.2 * problem.least_squares_on_truth()
    gaps = [c.gap for c in c_steps if c.mu > 0]
    assert gaps[-1] < 0.01
    if any(run.plan.dual_step):  # without them the gap closes only as μ grows without bound
        assert gaps[-1] < 0.5 * max(gaps)
    assert len(c_steps) == len(run.plan.c_steps)


def test_quantized_least_squares_without_support() -> None:
    problem = Problem(0, k=20)
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=0.05)
    run, c_steps, theta = solve(problem, Quantize("int8"), LCSchedule(l_steps=20), optimizer, 400)
    assert not run.finetuning
    assert len(theta.unique()) <= 255
    assert float(problem.loss(theta)) < 1.2 * problem.least_squares_on_truth()
    assert c_steps[-1].gap < 0.01


def test_projection_happens_only_at_c_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = Quantize.compress

    def counted(self, theta, targets):  # type: ignore[no-untyped-def]
        calls.append(1)
        return original(self, theta, targets)

    monkeypatch.setattr(Quantize, "compress", counted)
    problem = Problem()
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=0.05)
    _, c_steps, _ = solve(problem, Quantize("int8"), LCSchedule(l_steps=5), optimizer, 100)
    assert len(c_steps) == 6
    # one each, one for the final θ, at most one where the fine-tune phase begins
    assert len(calls) <= 8


@pytest.mark.parametrize("scheme", [Prune(0.2), Quantize("int8")])
def test_theta_right_after_a_c_step_is_that_of_the_c_step(scheme: Scheme) -> None:
    problem = Problem()
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=0.05)
    schedule = PaperSchedule(steps=5, mb_iterations_per_l=7, mu_init=0.3)
    _, c_steps, theta = solve(problem, scheme, schedule, optimizer, 28)
    assert torch.equal(theta, c_steps[-1].theta["weight"].decode())


def test_finetuning_trains_only_the_support() -> None:
    problem = Problem()
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=0.02, momentum=0.9)
    bound = Prune(0.2).bind(problem.network)
    plan = LCSchedule(l_steps=5, finetune=0.5).plan(40)
    run = LCRun(bound, plan, dict(problem.network.named_parameters()))
    run.start()
    masks = []
    for _ in range(40):
        optimizer.zero_grad()
        problem.loss(problem.network.weight).backward()
        run.before_step(optimizer, only_its_own=False)
        optimizer.step()
        run.after_step([optimizer])
        if run.finetuning:
            masks.append(problem.network.weight.detach() != 0)
    assert len(masks) == 21  # from the step that ends the L-C phase on
    assert all(torch.equal(m, masks[0]) for m in masks)
    assert int(masks[0].sum()) == 4
    assert set(run.gaps) == {"weight"}


def untrained_case(kind: str) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    if kind == "frozen":
        network[0].requires_grad_(False)
    trained: Sequence[nn.Parameter] = list(network[1].parameters())
    if kind == "frozen":
        trained = list(network.parameters())
    return network, torch.optim.SGD(trained, lr=0.05)


@pytest.mark.parametrize("kind", ["frozen", "not optimized"])
def test_untrained_layers_are_projected_as_they_are(kind: str) -> None:
    network, optimizer = untrained_case(kind)
    before = network[0].weight.detach().clone()
    scheme = Prune(0.25, scope="layer")
    expected = scheme.bind(network).pi(dict(network.named_parameters()))["0.weight"].decode()
    bound = scheme.bind(network)
    run = LCRun(
        bound,
        LCSchedule(l_steps=20).plan(100),
        {n: dict(network.named_parameters())[n] for n in bound.names},
    )
    run.start()
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    for i in range(100):
        if i == 69:
            assert torch.equal(network[0].weight.detach(), before)
        optimizer.zero_grad()
        network(x).square().mean().backward()
        run.before_step(optimizer, only_its_own=False)
        optimizer.step()
        run.after_step([optimizer])
    theta = run.project(run.parameters)["0.weight"].decode()
    torch.testing.assert_close(theta, expected)
    assert torch.equal(theta != 0, expected != 0)


def test_state_continues_bit_for_bit() -> None:
    for stop in (0, 3, 10, 11, 35):
        results = []
        for interrupted in (False, True):
            problem = Problem()
            optimizer = torch.optim.Adam(problem.network.parameters(), lr=0.01)
            parameters = dict(problem.network.named_parameters())
            bound = Compose([Prune(0.3), Quantize("float16")]).bind(problem.network)
            plan = LCSchedule(l_steps=7).plan(50)
            run = LCRun(bound, plan, parameters)
            run.start()
            for i in range(50):
                if interrupted and i == stop:
                    state = run.state_dict()
                    run = LCRun(bound, plan, parameters)
                    run.load_state_dict(state)
                optimizer.zero_grad()
                problem.loss(problem.network.weight).backward()
                run.before_step(optimizer, only_its_own=False)
                optimizer.step()
                run.after_step([optimizer])
            results.append(problem.network.weight.detach().clone())
        assert torch.equal(*results), f"interrupted after {stop} steps"


def test_support_of_theta_and_of_zeros() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    weights = dict(network.named_parameters())
    theta = Compose([NeuronPrune(0.5), Quantize("int8")]).bind(network).pi(weights)
    support = Support.of(theta)
    assert set(support.masks) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    dense = {n: torch.ones_like(w) for n, w in weights.items()}
    support.apply(dense)
    assert all(torch.equal(dense[n] != 0, m) for n, m in support.masks.items())
    assert not Support.of(Quantize("int8").bind(network).pi(weights)).masks

    with torch.no_grad():
        weights["0.weight"][2] = 0
    zeros = Support.nonzero(weights)
    assert set(zeros.masks) == {"0.weight"}
    for w in weights.values():
        w.grad = torch.ones_like(w)
    zeros.mask_gradients(weights)
    assert int(weights["0.weight"].grad.count_nonzero()) == 42  # type: ignore[union-attr]
    assert bool(weights["1.weight"].grad.all())  # type: ignore[union-attr]
    weights["0.weight"].grad = None
    zeros.mask_gradients(weights)  # a parameter without a gradient is passed over
