"""L-C with weights that are factors and sums: how they get there, and that it helps."""

from __future__ import annotations

from io import BytesIO

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.nn import functional

from lightning_condensa import Add, Codebook, Compose, LowRank, Prune, Quantize, Scheme
from lightning_condensa.lc import LCSchedule, PaperSchedule, Schedule, Support

from .problems import Classes, Training

SUM = Add([LowRank(rank=2), Prune(0.03)])


def training(scheme: Scheme, schedule: Schedule, steps: int = 40) -> Training:
    problem = Classes()
    return Training(
        problem, scheme, schedule, optim.Adam(problem.network.parameters(), 0.01), steps
    )


# -- what it is for ------------------------------------------------------------------------------


class Digits:
    """Handwritten digits, and a network of three layers that knows them."""

    def __init__(self) -> None:
        pixels, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        self.x, self.y = x[order[:1200]], y[order[:1200]]
        self.held_out = x[order[1200:]], y[order[1200:]]
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)
        )
        optimizer = optim.Adam(self.network.parameters(), 3e-3)
        for _ in range(250):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()

    def loss(self) -> Tensor:
        return functional.cross_entropy(self.network(self.x), self.y)

    def accuracy(self, weights: dict[str, Tensor]) -> float:
        x, y = self.held_out
        outputs = torch.func.functional_call(self.network, weights, (x,))
        return float((outputs.argmax(1) == y).float().mean())


@pytest.mark.parametrize(
    ("scheme", "gain", "least"),
    [
        (LowRank(rank=4), 0.3, 0.7),
        pytest.param(LowRank(density=0.25), 0.2, 0.6, marks=pytest.mark.slow),
        (SUM, 0.4, 0.85),
        pytest.param(
            Compose([LowRank(rank=4), Quantize("int4")]), 0.3, 0.65, marks=pytest.mark.slow
        ),
        pytest.param(Add([Codebook(2), Prune(0.02)], sweeps=4), 0.2, 0.9, marks=pytest.mark.slow),
    ],
    ids=lambda v: v.describe() if isinstance(v, Scheme) else "",
)
def test_training_recovers_what_truncation_loses(scheme: Scheme, gain: float, least: float) -> None:
    digits = Digits()
    bound = scheme.bind(digits.network)
    weights = {n: p.detach() for n, p in digits.network.named_parameters()}
    once = digits.accuracy(bound.delta(bound.pi(weights)))
    optimizer = optim.Adam(digits.network.parameters(), 1e-3)
    deployed = Training(digits, scheme, LCSchedule(l_steps=30), optimizer, 200).finish()  # type: ignore[arg-type]
    trained = digits.accuracy(deployed)
    assert trained > least
    assert trained > once + gain


# -- how weights get there -----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [LowRank(rank=2), LowRank(density=0.4), SUM], ids=str)
def test_weights_are_moved_part_of_the_way_at_each_c_step(scheme: Scheme) -> None:
    train = training(scheme, LCSchedule(l_steps=8))
    assert (train.plan.strength[0], train.plan.strength[-1]) == (0, 1)
    train.start()
    network, x, y = train.problem.network, train.problem.x, train.problem.y  # type: ignore[union-attr]
    while train.run.step < train.steps:
        train.optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        train.run.before_step(train.optimizer, only_its_own=False)
        train.optimizer.step()
        before = {n: train.weights[n].detach().clone() for n in train.bound.names}
        c_step = train.run.after_step([train.optimizer])
        for name, old in before.items():
            assert torch.equal(train.run.latent(train.weights)[name], train.weights[name])
            expected = old
            if c_step is not None:
                expected = old + c_step.strength * (c_step.theta[name].decode() - old)
            torch.testing.assert_close(train.weights[name].detach(), expected)
    assert c_step is not None
    assert c_step.strength == 1
    # A sum is found anew, to within what another sweep would gain.
    close = {"atol": 1e-4, "rtol": 1e-3} if scheme == SUM else {}
    for name, encoded in train.run.finish().items():
        torch.testing.assert_close(train.weights[name].detach(), encoded.decode(), **close)


def test_what_is_rounded_as_well_keeps_a_latent_weight_of_low_rank() -> None:
    scheme = Compose([LowRank(rank=2), Quantize("int8")])
    train = training(scheme, LCSchedule(l_steps=1, ramp=0.0, rate_start=1.0))
    train.optimizer.param_groups[0]["lr"] = 0.0
    low = LowRank(rank=2).bind(train.problem.network).pi(train.weights)
    for _ in train.all():
        pass
    latent = train.run.latent(train.weights)
    for name, encoded in train.c_steps[-1].theta.items():
        torch.testing.assert_close(train.weights[name].detach(), encoded.decode())
        torch.testing.assert_close(latent[name], low[name].decode())


def test_a_rank_by_energy_does_not_fall_from_c_step_to_c_step() -> None:
    train = training(LowRank(energy=0.6), LCSchedule(l_steps=20, ramp=0.0))
    train.optimizer.param_groups[0]["lr"] = 0.0
    train.finish()
    assert {c_step.density for c_step in train.c_steps} == {train.c_steps[0].density}
    assert train.c_steps[0].density < 0.7


def test_the_ramp_is_one_of_rank() -> None:
    train = training(LowRank(rank=1), LCSchedule(l_steps=8, shape=1.0))
    train.finish()
    densities = [c_step.density for c_step in train.c_steps]
    assert densities[0] == 1.0
    assert densities == sorted(densities, reverse=True)
    assert len(set(densities)) > 4
    values = {"0": 8 + 6, "2": 8 + 24, "5": 16 + 32, "7": 4 + 16}
    assert densities[-1] == sum(values.values()) / (48 + 192 + 512 + 64)


# -- what it reports -----------------------------------------------------------------------------


def test_a_sum_counts_values_and_prunes_nothing() -> None:
    train = training(SUM, LCSchedule(l_steps=4))
    assert train.plan.finetune_from is None
    train.finish()
    c_step = train.c_steps[-1]
    total = sum(e.numel for e in c_step.theta.values())
    assert c_step.density == sum(e.nnz for e in c_step.theta.values()) / total < 0.8
    assert c_step.value_bytes == sum(e.storage_bits for e in c_step.theta.values()) / 8
    assert train.run.density == 1.0
    assert c_step.lr_factor == 1.0
    assert not Support.of(c_step.theta).masks


def test_beside_pruned_layers_only_these_are_sparse() -> None:
    low = Add([LowRank(rank=2, include="^[05]"), Prune(0.05, include="^[05]")])
    scheme = Compose([Prune(0.25, include="^[27]", scope="layer"), low])
    train = training(scheme, LCSchedule(l_steps=8))
    deployed = train.finish()
    assert train.run.density == 0.25
    assert set(Support.of(train.c_steps[-1].theta).masks) == {"2.weight", "7.weight"}
    assert int(deployed["7.weight"].count_nonzero()) == 16
    assert bool(deployed["5.weight"].all())
    again = train.bound.delta(train.run.finish())
    assert all(torch.equal(t, deployed[n]) for n, t in again.items())


# -- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "schedule"),
    [
        (LowRank(rank=2), LCSchedule(l_steps=5)),
        (LowRank(energy=0.7), LCSchedule(l_steps=5)),
        (SUM, LCSchedule(l_steps=5)),
        (Compose([LowRank(rank=2), Quantize("int8")]), LCSchedule(l_steps=5)),
        (Compose([LowRank(rank=2), Quantize("ternary")]), LCSchedule(l_steps=5)),
        (Codebook(2), LCSchedule(l_steps=5)),
        (Compose([Prune(0.5), Codebook(2)]), LCSchedule(l_steps=5)),
        (SUM, PaperSchedule(steps=4, mu_init=0.1)),
    ],
    ids=["low rank", "energy", "sum", "rounded", "ternary", "codebook", "pruned", "paper"],
)
def test_state_continues_bit_for_bit(scheme: Scheme, schedule: Schedule) -> None:
    steps = 20
    whole = training(scheme, schedule, steps)
    expected = whole.finish()
    for stop in (1, 7, 12):
        train = training(scheme, schedule, steps)
        train.start()
        while train.run.step < stop:
            train.step()
        file = BytesIO()
        torch.save(train.run.state_dict(), file)
        file.seek(0)
        train.run = train.new_run()
        train.run.load_state_dict(torch.load(file, weights_only=True))
        while train.run.step < steps:
            train.step()
        theta = train.bound.delta(train.run.finish())
        assert all(torch.equal(theta[n], t) for n, t in expected.items())
