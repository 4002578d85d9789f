"""The state machine on problems small enough to know the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_condensa import (
    BlockPrune,
    Compose,
    FilterPrune,
    NeuronPrune,
    NMPrune,
    Prune,
    Quantize,
    Scheme,
)
from lightning_condensa.lc import LCRun, LCSchedule, PaperSchedule, Schedule, Support
from lightning_condensa.schemes import Encoded

from .problems import Classes, Problem, Training

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def training(
    problem: Problem | Classes,
    scheme: Scheme,
    schedule: Schedule,
    steps: int,
    optimizer: str = "sgd",
) -> Training:
    build = OPTIMIZERS[optimizer]
    return Training(problem, scheme, schedule, build(problem.network.parameters()), steps)


# -- the whole algorithm -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "schedule",
    [
        LCSchedule(l_steps=30),
        LCSchedule(l_steps=30, importance=0.0),
        LCSchedule(l_steps=30, prune_rate=0.1),
        LCSchedule(l_steps=30, finetune=0.0, ramp=0.5),
        PaperSchedule(steps=30, mu_init=0.05, mu_multiplier=1.2),
    ],
    ids=["default", "magnitude", "soft", "no finetune", "paper"],
)
def test_sparse_least_squares(schedule: Schedule, optimizer: str, seed: int) -> None:
    problem = Problem(seed)
    train = training(problem, Prune(problem.k / 20), schedule, 900, optimizer)
    theta = train.finish()["weight"]
    assert torch.equal(theta != 0, problem.truth != 0)
    assert float(problem.loss(theta)) < 1.2 * problem.least_squares_on_truth()
    assert len(train.c_steps) == len(train.plan.c_steps)
    if train.plan.proximal:
        assert torch.equal(theta, problem.network.weight)
    else:
        gaps = [c.gap for c in train.c_steps]
        assert gaps[-1] < min(0.01, 0.5 * max(gaps))


def test_quantized_least_squares() -> None:
    problem = Problem(0, k=20)
    train = training(problem, Quantize("int8"), LCSchedule(l_steps=20), 400)
    theta = train.finish()["weight"]
    assert not train.run.finetuning
    assert len(theta.unique()) <= 255
    assert float(problem.loss(theta)) < 1.25 * problem.least_squares_on_truth()
    assert train.c_steps[-1].gap < 0.01


@pytest.mark.parametrize("prune_rate", [1.0, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_sparse_and_quantized_least_squares(seed: int, prune_rate: float) -> None:
    problem = Problem(seed)
    scheme = Compose([Prune(problem.k / 20), Quantize("int8")])
    train = training(problem, scheme, LCSchedule(l_steps=30, prune_rate=prune_rate), 600)
    theta = train.finish()["weight"]
    assert torch.equal(theta != 0, problem.truth != 0)
    assert float(problem.loss(theta)) < 1.5 * problem.least_squares_on_truth()
    encoded = train.run.finish()["weight"]
    assert encoded.codes.dtype == torch.int8
    assert encoded.nnz == problem.k
    assert train.c_steps[-1].gap < 0.01  # w was led to values that the scheme allows


# -- what survives -------------------------------------------------------------------------------


def share(density: float, *counts: int) -> int:
    return round(density * sum(counts))


def elements(theta: dict[str, Encoded], names: Sequence[str]) -> list[int]:
    return [int(theta[n].mask.count_nonzero()) for n in names]  # type: ignore[union-attr]


def groups(mask: Tensor, size: tuple[int, int] | None = None) -> list[bool]:
    """For each row, or block of a matrix, whether it is kept; none is kept in part."""
    if size is None:
        rows = mask.flatten(1)
    else:
        blocks = mask.unfold(0, size[0], size[0]).unfold(1, size[1], size[1])
        rows = blocks.flatten(0, 1).flatten(1)
    assert torch.equal(rows.any(1), rows.all(1))
    return rows.any(1).tolist()


def check_global(theta: dict[str, Encoded]) -> None:
    assert sum(elements(theta, list(theta))) == share(0.13, 48, 192, 512, 64)


def check_layers(theta: dict[str, Encoded]) -> None:
    sizes = [e.numel for e in theta.values()]
    assert elements(theta, list(theta)) == [share(0.13, n) for n in sizes]


def check_rows(theta: dict[str, Encoded], kept: int) -> None:
    total = 0
    for name in [n for n in theta if n.endswith("weight")]:
        rows = groups(theta[name].mask)  # type: ignore[arg-type]
        bias = theta[name.replace("weight", "bias")]
        assert bias.mask.tolist() == rows  # type: ignore[union-attr]
        total += sum(rows)
    assert total == kept


def check_blocks(theta: dict[str, Encoded]) -> None:
    kept = [groups(e.mask, (4, 4)) for e in theta.values()]  # type: ignore[arg-type]
    assert sum(map(sum, kept)) == share(0.3, *map(len, kept))


def check_n_of_m(theta: dict[str, Encoded]) -> None:
    for encoded in theta.values():
        assert encoded.mask is not None
        per_group = encoded.mask.movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1)
        assert (per_group == 2).all()


SCHEMES: dict[str, tuple[Scheme, Callable[[dict[str, Encoded]], None]]] = {
    "global": (Prune(0.13), check_global),
    "layer": (Prune(0.13, scope="layer"), check_layers),
    "filters": (FilterPrune(0.4), lambda t: check_rows(t, share(0.4, 8, 8))),
    "neurons": (NeuronPrune(0.35), lambda t: check_rows(t, share(0.35, 16, 4))),
    "blocks": (BlockPrune(0.3, block_size=(4, 4), types="Linear"), check_blocks),
    "n of m": (NMPrune(2, 4, exclude=r"^0\."), check_n_of_m),
}


@pytest.mark.parametrize("importance", [0.0, 1.0])
@pytest.mark.parametrize("prune_rate", [1.0, 0.2])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", SCHEMES)
def test_exactly_what_the_scheme_says_survives(
    kind: str, quantized: bool, prune_rate: float, importance: float
) -> None:
    scheme, check = SCHEMES[kind]
    whole = Compose([scheme, Quantize("int8")]) if quantized else scheme
    schedule = LCSchedule(l_steps=6, prune_rate=prune_rate, importance=importance, window=3)
    train = training(Classes(), whole, schedule, 40, "adam")
    deployed = train.finish()
    theta = train.run.finish()
    pruned = {n: e for n, e in theta.items() if e.mask is not None}
    check(pruned)
    for name, encoded in pruned.items():
        assert not deployed[name][~encoded.mask].any()  # type: ignore[index]
    final = train.c_steps[-1].theta  # the last C-step decided, whatever came after
    assert all(torch.equal(final[n].mask, e.mask) for n, e in pruned.items())


def test_the_density_falls_along_the_ramp() -> None:
    schedule = LCSchedule(l_steps=8, shape=1.0, finetune=0.2)
    train = training(Problem(d=100), Prune(0.2), schedule, 100)
    train.finish()
    kept = [sum(e.nnz for e in c.theta.values()) for c in train.c_steps]
    assert kept == [round(100 * (1 - 0.8 * i / 8)) for i in range(9)]


def sparse_problem(density: float, **options: int) -> Problem:
    problem = Problem(**options)
    weight = problem.network.weight.detach()[0]
    weight[weight.abs().argsort()[: round(len(weight) * (1 - density))]] = 0
    return problem


@pytest.mark.parametrize("already", [0.5, 0.2, 0.1])
def test_the_ramp_begins_where_the_weights_are(already: float) -> None:
    train = training(
        sparse_problem(already, d=200), Prune(0.2), LCSchedule(l_steps=10, shape=1.0), 100
    )
    train.finish()
    kept = [sum(e.mask.sum() for e in c.theta.values()) for c in train.c_steps]  # type: ignore[union-attr,misc]
    assert abs(kept[0] - 200 * max(already, 0.2)) <= 1
    assert all(a >= b for a, b in pairwise(kept))
    assert kept[-1] == 40


# -- C-steps -------------------------------------------------------------------------------------


def test_projection_happens_only_at_c_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = Quantize.compress

    def counted(self, theta, targets):  # type: ignore[no-untyped-def]
        calls.append(1)
        return original(self, theta, targets)

    monkeypatch.setattr(Quantize, "compress", counted)
    train = training(Problem(), Quantize("int8"), LCSchedule(l_steps=5), 100)
    for _ in train.all():
        pass
    assert len(train.c_steps) == len(calls) == 6


def test_rounding_goes_on_in_fine_tuning_on_the_same_support() -> None:
    scheme = Compose([Prune(0.2), Quantize("int8")])
    train = training(Problem(), scheme, LCSchedule(l_steps=5, finetune=0.5), 40)
    train.finish()
    assert train.plan.c_steps == (0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40)
    assert len(train.c_steps) == 11
    settled = [c.theta["weight"].mask for c in train.c_steps[5:]]
    assert all(torch.equal(m, settled[0]) for m in settled)  # type: ignore[arg-type]
    scales = {float(c.theta["weight"].scale) for c in train.c_steps[5:]}  # type: ignore[arg-type]
    assert len(scales) > 1


@pytest.mark.parametrize("scheme", [Prune(0.2), Quantize("int8")])
def test_theta_right_after_a_c_step_is_that_of_the_c_step(scheme: Scheme) -> None:
    schedule = PaperSchedule(steps=5, mb_iterations_per_l=7, mu_init=0.3)
    train = training(Problem(), scheme, schedule, 28)
    theta = train.finish()["weight"]
    assert torch.equal(theta, train.c_steps[-1].theta["weight"].decode())


@pytest.mark.parametrize("steps", range(1, 11))
@pytest.mark.parametrize("finetune", [0.0, 0.3, 1.0])
def test_tiny_runs(steps: int, finetune: float) -> None:
    train = training(Problem(), Prune(0.2), LCSchedule(finetune=finetune), steps)
    theta = train.finish()["weight"]
    assert train.run.finetuning
    assert int(theta.count_nonzero()) == 4
    assert torch.equal(theta, train.problem.network.weight)


def test_what_a_c_step_reports() -> None:
    problem = Problem()
    train = training(problem, Prune(0.2), LCSchedule(ramp=0.0, finetune=0.0), 10)
    weight = problem.network.weight.detach().clone()
    train.start()
    (c_step,) = train.c_steps
    theta = c_step.theta["weight"].decode()
    assert c_step.gap == pytest.approx(float((weight - theta).norm() / theta.norm()))
    assert c_step.gradient_ratio is None
    assert c_step.seconds > 0
    assert c_step.strength == train.plan.strength[0]
    assert train.run.gaps == {}
    while train.run.step < 10:
        train.step()
    assert set(train.run.gaps) == {"weight"}


def test_the_papers_run_reports_the_penaltys_share_of_the_gradient() -> None:
    schedule = PaperSchedule(steps=5, mb_iterations_per_l=7, mu_init=0.3)
    train = training(Problem(), Prune(0.2), schedule, 28)
    train.finish()
    ratios = [c.gradient_ratio for c in train.c_steps]
    assert ratios[0] is None  # before training
    assert all(r is not None and 0 < r < math.inf for r in ratios[1:])


# -- fine-tuning ---------------------------------------------------------------------------------


def test_finetuning_trains_only_the_support() -> None:
    schedule = LCSchedule(l_steps=5, finetune=0.5)
    train = training(Problem(), Prune(0.2), schedule, 40, "nesterov")
    masks, values = [], []
    for _ in train.all():
        if train.run.finetuning:
            masks.append(train.weights["weight"].detach() != 0)
            values.append(train.weights["weight"].detach().clone())
    assert len(masks) == 21  # from the step that ends the L-C phase on
    assert all(torch.equal(m, masks[0]) for m in masks)
    assert int(masks[0].sum()) == 4
    assert not torch.equal(values[0], values[-1])
    assert set(train.run.gaps) == {"weight"}


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
@pytest.mark.parametrize(
    "schedule",
    [LCSchedule(l_steps=20, importance=0.0), PaperSchedule(steps=20)],
    ids=["default", "paper"],
)
def test_untrained_layers_are_projected_as_they_are(schedule: Schedule, kind: str) -> None:
    network, optimizer = untrained_case(kind)
    before = network[0].weight.detach().clone()
    bound = Prune(0.25, scope="layer").bind(network)
    parameters = {n: dict(network.named_parameters())[n] for n in bound.names}
    expected = bound.pi(parameters)["0.weight"].decode()
    run = LCRun(bound, schedule.plan(100), parameters)
    run.start()
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        network.zero_grad()
        network(x).square().mean().backward()
        run.before_step(optimizer, only_its_own=False)
        optimizer.step()
        run.after_step([optimizer])
    theta = run.finish()["0.weight"].decode()
    assert torch.equal(theta != 0, expected != 0)
    torch.testing.assert_close(theta, expected)
    if not run.plan.proximal:  # only θ is compressed
        assert torch.equal(network[0].weight.detach(), before)


# -- state ---------------------------------------------------------------------------------------


def from_file(state: Any) -> Any:
    file = BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("scheme", "schedule", "start"),
    [
        (Prune(0.3), LCSchedule(l_steps=7), 1.0),
        (Prune(0.3), LCSchedule(l_steps=7), 0.8),
        (Compose([Prune(0.3), Quantize("int8")]), LCSchedule(l_steps=7, importance=1.0), 1.0),
        (Compose([Prune(0.3), Quantize("float16")]), LCSchedule(l_steps=7, prune_rate=0.3), 1.0),
        (Quantize("int8"), LCSchedule(l_steps=7), 1.0),
        (Prune(0.3), PaperSchedule(steps=6, mu_init=0.1), 1.0),
    ],
    ids=["hard", "sparse start", "quantized", "soft", "values only", "paper"],
)
def test_state_continues_bit_for_bit(scheme: Scheme, schedule: Schedule, start: float) -> None:
    steps = 30
    whole = training(sparse_problem(start), scheme, schedule, steps, "adam")
    expected = whole.finish()
    for stop in range(steps):
        train = training(sparse_problem(start), scheme, schedule, steps, "adam")
        train.start()
        while train.run.step < stop:
            train.step()
        state = from_file(train.run.state_dict())
        train.run = train.new_run()
        train.run.load_state_dict(state)
        while train.run.step < steps:
            train.step()
        theta = train.bound.delta(train.run.finish())
        for name, tensor in expected.items():
            assert torch.equal(theta[name], tensor), f"interrupted after {stop} steps"
            assert torch.equal(train.weights[name], whole.weights[name])
        assert train.run.gaps == whole.run.gaps
        assert len(train.c_steps) == len(whole.c_steps)


@pytest.mark.parametrize("stop", [3, 13, 18, 27])
@pytest.mark.parametrize("total", [19, 24, 60])
def test_a_run_that_becomes_shorter_or_longer_ends_with_the_scheme(total: int, stop: int) -> None:
    train = training(Problem(d=50), Prune(0.2), LCSchedule(l_steps=7), 30)
    train.start()
    while train.run.step < stop:
        train.step()
    total = max(total, stop + 1)
    state, train.plan = train.run.state_dict(), LCSchedule(l_steps=7).plan(total)
    train.run = train.new_run()
    train.run.load_state_dict(state)
    kept = [int(train.weights["weight"].count_nonzero())]
    while train.run.step < total:
        train.step()
        kept.append(int(train.weights["weight"].count_nonzero()))
    assert all(a >= b for a, b in pairwise(kept))
    assert train.run.finetuning  # the support was settled before the end, not at it
    assert kept[-1] == 10
    assert torch.equal(train.run.finish()["weight"].decode(), train.weights["weight"])


def test_a_run_that_is_stopped_early_ends_with_the_scheme() -> None:
    train = training(Problem(d=50), Prune(0.2), LCSchedule(l_steps=7), 30)
    train.start()
    for _ in range(8):
        train.step()
    assert train.run.finish()["weight"].nnz == 10
    assert train.run.project(train.run.parameters)["weight"].nnz == 10


# -- supports ------------------------------------------------------------------------------------


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
