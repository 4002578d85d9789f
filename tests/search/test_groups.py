"""Several dimensions: domains, ensembles of damage, scans, groups, whole searches."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import Toy, loaders, search

from lightning_condensa import (
    Choice,
    Compose,
    MemoryFootprint,
    Prune,
    Quantize,
    Range,
    Scheme,
    allocate,
    per_group,
)
from lightning_condensa.schemes import SelectionError
from lightning_condensa.search.damage import DamageCurves, DamagePrior, features
from lightning_condensa.search.domain import Axis, Domain
from lightning_condensa.search.ensemble import DamageEnsemble, DamageMixture
from lightning_condensa.search.landscape import Landscape
from lightning_condensa.search.problem import Observation, best_feasible
from lightning_condensa.search.sensitivity import Sensitivity
from lightning_condensa.search.space import SearchSpace
from lightning_condensa.search.strategies import make_strategy
from lightning_condensa.search.synthetic_groups import SyntheticGroups


def observed(case: SyntheticGroups, count: int, seed: int = 1) -> list[Observation]:
    level = case.domain.random(count, seed=seed) // 3
    return [case.observe(point) for point in case.domain.points(level)]


# -- the surrogate -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [False, True])
def test_derivatives_are_those_of_the_loss(bits: bool) -> None:
    axes = SyntheticGroups.draw(0, groups=3, bits=bits).domain.axes
    generator = torch.Generator().manual_seed(0)
    parameters = DamagePrior.of(axes, 0.01).draw(4, generator)
    depth = torch.full((4,), 0.8, dtype=torch.float64)
    domain = Domain(axes, lambda level: level.double().sum(-1))
    points = domain.points(domain.random(5, seed=0) // 3)

    def loss(values: Tensor) -> Tensor:
        return DamageCurves(axes, values, depth).drop(points)

    value, slopes = DamageCurves(axes, parameters, depth).jacobian(*features(axes, points))
    torch.testing.assert_close(value, loss(parameters))
    whole = torch.autograd.functional.jacobian(loss, parameters)
    own = torch.stack([whole[i, :, i] for i in range(4)])
    torch.testing.assert_close(slopes, own, atol=1e-9, rtol=1e-6)


def test_ensemble_recovers_known_damage() -> None:
    case = SyntheticGroups.draw(0, groups=3)
    axes = case.domain.axes
    location = torch.tensor([1.0, 2.0, 3.0, *[math.log(0.4)] * 3, 0.0], dtype=torch.float64)
    truth = DamageCurves(axes, location[None], torch.tensor([0.7]).double())
    problem = case.problem()
    level = case.domain.random(40, seed=3) // 2
    history = [
        Observation(p, case.baseline - float(truth.drop(p[None])), 1e-8, None)
        for p in case.domain.points(level)
    ]
    model = DamageEnsemble(problem, history, seed=0)
    found = (model.curves.parameters[:, :3] * model.log_weights.exp()[:, None]).sum(0)
    torch.testing.assert_close(found, location[:3], atol=0.25, rtol=0)
    probe = case.domain.points(case.domain.random(60, seed=9) // 3)
    expected = case.baseline - truth.drop(probe)[0]
    shallow = expected > case.baseline - 0.05
    metric = DamageMixture(problem, history, seed=0).predict(probe)[0]
    torch.testing.assert_close(metric[shallow], expected[shallow], atol=0.01, rtol=0)


def test_a_scan_is_believed_where_it_predicts_and_not_where_it_does_not() -> None:
    case = SyntheticGroups.draw(5, groups=6)
    history = observed(case, 16)
    reversed_order = case.location.max() + case.location.min() - case.location
    good, bad = (
        DamageMixture(case.problem(scan=scan), history, seed=0).log_shares.exp()[1].item()
        for scan in (case.scan(), reversed_order)
    )
    assert good > 0.6
    assert bad < 0.3


def test_divergence_makes_a_point_and_those_beyond_it_unlikely() -> None:
    case = SyntheticGroups.draw(1, groups=3)
    point = case.domain.points(torch.tensor([[25, 25, 25]]))
    problem = case.problem()
    lost = [Observation(point[0], None, 1e-6, None, diverged=True)]
    before, after = (
        DamageMixture(problem, seen, seed=0).feasibility(point * 1.2).probability.item()
        for seen in ([], lost)
    )
    assert after < 0.1 < before


# -- proposals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "bits"),
    [
        (True, False),
        pytest.param(True, True, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_proposals_are_legal_distinct_and_reproducible(accuracy: bool, bits: bool) -> None:
    case = SyntheticGroups.draw(2, groups=3, bits=bits)
    problem = case.problem()
    object.__setattr__(problem, "accuracy", accuracy)
    strategy, history = make_strategy("condensa"), list[Observation]()
    for trial in range(3):
        busy = case.domain.points(case.domain.random(2, seed=trial))
        points = strategy.suggest(problem, history, busy, q=3, seed=trial)
        assert torch.equal(points, strategy.suggest(problem, history, busy, q=3, seed=trial))
        assert torch.equal(case.domain.points(case.domain.nearest(points)), points)
        history += [case.observe(point) for point in points]
        taken = torch.stack([*busy, *(seen.point for seen in history)])
        assert len(taken.unique(dim=0)) == len(taken) or len(busy.unique(dim=0)) < len(busy)
    assert len({tuple(seen.point.tolist()) for seen in history}) == 9


@pytest.mark.slow
def test_groups_beat_one_density_and_a_useless_scan_does_no_harm() -> None:
    regret: dict[str, list[float]] = {"none": [], "meaningless": [], "single": []}
    for seed in range(2):
        case = SyntheticGroups.draw(seed, groups=6)
        regret["single"].append(case.optimum - case.single_density())
        for kind in ("none", "meaningless"):
            scan = None if kind == "none" else case.scan(meaningless=True)
            problem, history = case.problem(scan=scan), list[Observation]()
            for trial in range(14):
                point = make_strategy("condensa").suggest(problem, history, None, 1, trial)[0]
                history.append(case.observe(point))
            best = best_feasible(history, problem.level)
            assert best is not None
            regret[kind].append(case.optimum - problem.utility_of(history[best]))
    mean = {kind: sum(values) / len(values) for kind, values in regret.items()}
    assert mean["none"] < 0.5 * mean["single"]
    assert mean["meaningless"] < 0.6 * mean["single"]


def test_diagonal_gives_all_groups_one_density() -> None:
    long = Axis(torch.linspace(0, 4, 9).double()[:, None], origin=0.0)
    short = Axis(torch.linspace(0, 2, 5).double()[:, None], origin=0.0)
    domain = Domain((long, short, Axis(torch.eye(2), None)), lambda level: level.double().sum(-1))
    points = domain.points(domain.diagonals())
    assert torch.equal(points[:, 0].clamp(max=2), points[:, 1])
    assert len(points) == 18


# -- one scheme for each group -------------------------------------------------------------------


class Net(pl.LightningModule):
    """Two layers; the metric falls when the small one is pruned, and barely by the large one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 100, bias=False))


def test_per_group_by_layer_depth_and_pattern() -> None:
    torch.manual_seed(0)  # int8 must not round a weight to zero
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])
    both = Compose([Prune(Range(0.1, 1.0)), Quantize(Choice(["int8", "int4"]))])
    layers = per_group(both, net)
    assert len(layers.space()) == 10
    values: dict[str, Any] = {n: 1.0 if "density" in n else "int8" for n in layers.space()}
    values["prune.density[^3\\.]"] = 0.25
    theta = layers.at(values).bind(net).pi(dict(net.named_parameters()))
    assert [theta[f"{i}.weight"].nnz for i in range(5)] == [16, 16, 16, 4, 16]
    thirds = per_group(Prune(Range(0.1, 1.0)), net, by="depth")
    assert [*thirds.overrides] == ["^(?:0\\.|1\\.)", "^(?:2\\.|3\\.)", "^4\\."]
    named = per_group(Prune(Range(0.1, 1.0)), net, by=["^[01]"])
    assert len(named.space()) == 2
    assert Scheme.from_yaml(named.to_yaml()) == named


@pytest.mark.parametrize(
    ("scheme", "by", "error", "message"),
    [
        (Prune(0.5), "layer", ValueError, "no Range or Choice"),
        (Prune(Range(0.1, 1.0)), "size", ValueError, "by must be"),
        (Prune(Range(0.1, 1.0)), ["nothing"], SelectionError, "matches no weight"),
        (Prune(Range(0.1, 1.0)), ["("], ValueError, "by must hold regular"),
        (Prune(Range(0.1, 1.0), overrides={"0": 0.5}), "layer", ValueError, "overrides already"),
    ],
)
def test_per_group_refuses(scheme: Scheme, by: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        per_group(scheme, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), by=by)


def test_sizes_of_combinations_are_sums_of_tables() -> None:
    net = Net()
    scheme = per_group(
        Compose([Prune(Range(0.02, 1.0, log=True)), Quantize(Choice(["int4", "float16"]))]), net
    )
    space = SearchSpace(scheme)
    found = Landscape(MemoryFootprint(count="values"), space, net, 4 * 2400.0)
    assert found.domain is not None and found.domain.exact is None
    level = found.domain.random(10, seed=4)
    for row, utility in zip(level, found.domain.utility(level), strict=True):
        values = found.values(found.domain.points(row[None])[0])
        assert float(utility) == pytest.approx(found.utility(found.measure(values)), abs=0.05)
    # Of two options the one that saves less is the milder one, in whatever order they were given.
    mildest = found.values(found.domain.points(torch.zeros(1, 4).long())[0])
    assert mildest["quantize.dtype"] == mildest["quantize_2.dtype"] == "float16"


# -- a scan --------------------------------------------------------------------------------------


def test_scan_finds_the_sensitive_group_and_survives_storage() -> None:
    net = Net()
    space = SearchSpace(per_group(Prune(Range(0.01, 1.0, log=True)), net))
    original = net.body[0].weight.detach().clone()

    def accuracy(module: pl.LightningModule) -> float:
        small, large = (float((layer.weight != 0).float().mean()) for layer in module.body)
        return 0.9 - 0.3 * min(-math.log(small), 2.0) - 0.01 * -math.log(large)

    found = Sensitivity.scan(space, net, accuracy)
    assert torch.equal(net.body[0].weight, original)
    assert found.ranking(0.05)[0].startswith("density[^body\\.0")
    prior = found.prior(space, loss=0.05)
    assert prior[0] < 1.0 < prior[1]
    assert Sensitivity.from_dict(found.to_dict()) == found


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), groups=st.integers(1, 4), options=st.integers(1, 3))
def test_allocation_is_the_best_within_the_budget(seed: int, groups: int, options: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = [f"g{i}" for i in range(groups)]
    losses = {n: torch.rand(options, generator=generator).tolist() for n in names}
    sizes = {n: torch.randint(1, 9, (options,), generator=generator).tolist() for n in names}
    low, high = (sum(f(own) for own in sizes.values()) for f in (min, max))
    budget = low + (high - low) * float(torch.rand(1, generator=generator)) + 0.5
    chosen = allocate(losses, sizes, budget)
    assert sum(sizes[n][chosen[n]] for n in names) <= budget
    total = sum(losses[n][chosen[n]] for n in names)
    best = min(
        sum(losses[n][i] for n, i in zip(names, pick, strict=True))
        for pick in itertools.product(range(options), repeat=groups)
        if sum(sizes[n][i] for n, i in zip(names, pick, strict=True)) <= budget
    )
    assert total == pytest.approx(best)


@pytest.mark.parametrize(
    ("losses", "sizes", "budget", "message"),
    [
        ({"a": [0.0]}, {"b": [1.0]}, 2.0, "same groups"),
        ({"a": [0.0]}, {"a": [1.0, 2.0]}, 2.0, "a loss and a size for each"),
        ({"a": [math.nan]}, {"a": [1.0]}, 2.0, "must be finite"),
        ({"a": [0.0]}, {"a": [3.0]}, 2.0, "less than the smallest"),
    ],
)
def test_allocation_refuses(losses: Any, sizes: Any, budget: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(losses, sizes, budget)


# -- a whole search ------------------------------------------------------------------------------


class Layers(Toy):
    """Two layers of which the first loses accuracy at once and the second hardly any."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(100, 20, bias=False), self.layer

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        drop = 0.0
        for layer, cliff in ((self.first, 0.5), (self.second, 0.03)):
            density = float(torch.count_nonzero(layer.weight)) / layer.weight.numel()
            drop += 0.3 * min(max(math.log(cliff / density), 0.0), 1.0)
        self.log_dict({"val_acc": 0.95 - drop, "val_loss": 0.1 + drop})


@pytest.mark.slow
def test_search_over_groups_is_smaller_than_one_density(tmp_path: Path) -> None:
    scheme = Prune(Range(0.01, 1.0, log=True))
    torch.manual_seed(0)
    model = Layers()
    settings: dict[str, Any] = {"objective": MemoryFootprint(count="values"), "max_trials": 10}
    single = search(tmp_path / "one", scheme=scheme, **settings).fit(model, **loaders())
    groups = per_group(scheme, model)
    result = search(tmp_path / "groups", scheme=groups, **settings).fit(model, **loaders())
    assert single.best is not None and result.best is not None
    assert result.best.objective < 0.75 * single.best.objective
    assert len({tuple(t.values.values()) for t in result.trials}) == 10
    # The scan is in the study: another fit does not validate again.
    again = search(tmp_path / "groups", scheme=groups, **settings).fit(model, **loaders())
    assert [t.values for t in again.trials] == [t.values for t in result.trials]
