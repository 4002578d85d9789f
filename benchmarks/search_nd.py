"""Search over a density, and bits, for each group: regret on synthetic networks.

Run ``python benchmarks/search_nd.py``, or parts of it with ``--groups``, ``--bits`` and
``--methods``: results are added to ``benchmarks/results/search_nd.json``. Regret is ``ln(f*/f)`` of
the evaluated point of greatest utility that was seen to be feasible (the dense model while there is
none); ``f*`` is the best truly feasible combination that a local search with the true accuracy
found.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optuna
import torch
from ax_search import AxLoop, available
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.acquisition.objective import GenericMCObjective
from botorch.fit import fit_gpytorch_mll
from botorch.generation.sampling import ConstrainedMaxPosteriorSampling
from botorch.models import ModelListGP, SingleTaskGP
from botorch.sampling import SobolQMCNormalSampler
from common import environment_index, update_results
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor
from torch.quasirandom import SobolEngine

from lightning_condensa.search.pool import trust_region
from lightning_condensa.search.problem import Observation, Problem, best_feasible
from lightning_condensa.search.strategies import make_strategy
from lightning_condensa.search.synthetic_groups import SyntheticGroups

BUDGETS = (10, 20, 40)
#: Random points before the first model of the methods built here from BoTorch.
INITIAL = 5
CANDIDATES = 1_000
Run = Callable[[SyntheticGroups, int, int], list[Observation]]


def ours(scan: str = "none", accuracy: bool = True) -> Run:
    """The default strategy: without a scan, with a ``"useful"`` or a ``"meaningless"`` one."""

    def run(case: SyntheticGroups, seed: int, trials: int) -> list[Observation]:
        found = None if scan == "none" else case.scan(meaningless=scan == "meaningless")
        problem = case.problem(scan=found)
        if not accuracy:
            object.__setattr__(problem, "accuracy", False)
        strategy, history = make_strategy("condensa"), list[Observation]()
        for trial in range(trials):
            points = strategy.suggest(problem, history, None, q=1, seed=1000 * seed + trial)
            history.append(case.observe(points[0]))
        return history

    return run


def best_density(case: SyntheticGroups, seed: int, trials: int) -> list[Observation]:
    """One strength for all, the best there is: what a perfect search in one dimension finds."""
    level = case.domain.diagonals()
    feasible = case.accuracy(level) >= case.baseline - case.tolerance
    best = case.domain.utility(level).masked_fill(~feasible, -torch.inf).argmax()
    point = case.domain.points(level[best : best + 1])[0]
    return [
        Observation(point, case.baseline, 0.0, float(case.domain.utility(level[best : best + 1])))
    ]


def with_optuna(make_sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Run:
    """Let Optuna suggest densities on a log scale and bits, with the accuracy as a constraint."""

    def run(case: SyntheticGroups, seed: int, trials: int) -> list[Observation]:
        problem, history = case.problem(), list[Observation]()
        study = optuna.create_study(direction="maximize", sampler=make_sampler(seed))
        for _ in range(trials):
            trial = study.ask()
            parts = []
            for i, axis in enumerate(case.domain.axes):
                if axis.is_range:
                    low, high = float(axis.levels[0, 0]), float(axis.levels[-1, 0])
                    parts.append(torch.tensor([trial.suggest_float(f"u{i}", low, high)]).double())
                else:
                    chosen = trial.suggest_categorical(f"bits{i}", list(range(len(axis))))
                    parts.append(axis.levels[chosen])
            seen = case.observe(torch.cat(parts))
            assert seen.metric is not None and seen.utility is not None
            trial.set_constraint("metric", problem.level - seen.metric)
            study.tell(trial, seen.utility)
            history.append(seen)
        return history

    return run


def with_ax(case: SyntheticGroups, seed: int, trials: int) -> list[Observation]:
    """Let Ax suggest u = −ln(density) and bits."""
    problem, history = case.problem(), list[Observation]()
    axes = {
        f"{'u' if axis.is_range else 'bits'}{i}": axis for i, axis in enumerate(case.domain.axes)
    }
    ranges = {
        n: (float(a.levels[0, 0]), float(a.levels[-1, 0])) for n, a in axes.items() if a.is_range
    }
    choices = {n: list(range(len(a))) for n, a in axes.items() if not a.is_range}
    loop = AxLoop(ranges, choices, problem.level, seed)
    loop.begin({n: ranges[n][0] if n in ranges else 0 for n in axes}, problem.baseline)
    for _ in range(trials):
        trial, found = loop.ask()
        parts = [
            torch.tensor([found[n]]).double() if n in ranges else a.levels[found[n]]
            for n, a in axes.items()
        ]
        seen = case.observe(torch.cat(parts))
        loop.tell(trial, seen)
        history.append(seen)
    return history


def with_botorch(choose: Callable[..., Tensor]) -> Run:
    """A loop over the unit cube: an objective and a slack, each a process, and ``choose``."""

    def run(case: SyntheticGroups, seed: int, trials: int) -> list[Observation]:
        problem, history = case.problem(), list[Observation]()
        sizes = case.domain.sizes - 1
        cube = SobolEngine(len(sizes), scramble=True, seed=seed).draw(INITIAL, dtype=torch.float64)
        for trial in range(trials):
            if trial < INITIAL:
                share = cube[trial]
            else:
                known = [problem.baseline, *history]  # these are told the dense model
                levels = case.domain.nearest(torch.stack([s.point for s in known]))
                torch.manual_seed(1000 * seed + trial)
                share = choose(problem, known, levels.double() / sizes, trial)
            level = (share * sizes).round().long()
            history.append(case.observe(case.domain.points(level[None])[0]))
        return history

    return run


def _models(problem: Problem, history: Sequence[Observation], x: Tensor) -> ModelListGP:
    """Processes of the utility, and of the violation in tolerances, cut at 3."""
    missing = torch.tensor([[problem.level - (s.metric or 0.0)] for s in history]).double()
    violation = (missing / problem.tolerance).clamp(max=3.0)
    utility = torch.tensor([[s.utility or 0.0] for s in history]).double()
    models = [SingleTaskGP(x, utility), SingleTaskGP(x, violation)]
    for model in models:
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return ModelListGP(*models)


def _value(problem: Problem, seen: Observation) -> float:
    """Utility of a feasible point; below all of these the slack of others."""
    assert seen.metric is not None and seen.utility is not None
    return seen.utility if seen.feasible(problem.level) else seen.metric - problem.level - 10


def _box(centre: Tensor, length: float, count: int) -> Tensor:
    """Random points of a box that differ from its middle in about twenty coordinates at most."""
    low, high = (centre - length / 2).clamp(0, 1), (centre + length / 2).clamp(0, 1)
    draws = low + (high - low) * torch.rand(count, len(centre), dtype=torch.float64)
    return torch.where(torch.rand_like(draws) < min(1.0, 20 / len(centre)), draws, centre)


def scbo(problem: Problem, history: Sequence[Observation], x: Tensor, trial: int) -> Tensor:
    """Constrained Thompson sampling in a trust region (Eriksson and Poloczek, 2021)."""
    models = _models(problem, history, x)
    values = [_value(problem, s) for s in history]
    centre = x[max(range(len(x)), key=values.__getitem__)]
    length = trust_region(values, x.shape[1])
    sampling = ConstrainedMaxPosteriorSampling(
        models.models[0], ModelListGP(models.models[1]), replacement=False
    )
    with torch.no_grad():
        found: Tensor = sampling(_box(centre, length, CANDIDATES), num_samples=1)
    return found[0]


def qlogei(problem: Problem, history: Sequence[Observation], x: Tensor, trial: int) -> Tensor:
    """Constrained log expected improvement, over random points and some around the best."""
    models = _models(problem, history, x)
    best = best_feasible(history, problem.level)
    incumbent = 0.0 if best is None else history[best].utility
    acquisition = qLogExpectedImprovement(
        models,
        best_f=incumbent,
        sampler=SobolQMCNormalSampler(torch.Size([64]), seed=trial),
        objective=GenericMCObjective(lambda samples, X: samples[..., 0]),  # noqa: N803
        constraints=[lambda samples: samples[..., 1]],
    )
    centre = x[-1] if best is None else x[best]
    points = torch.cat([torch.rand(CANDIDATES, x.shape[1]).double(), _box(centre, 0.3, CANDIDATES)])
    with torch.no_grad():
        for _ in range(3):
            values = acquisition(points.unsqueeze(-2))
            top = points[values.topk(8).indices]
            points = torch.cat([top, *(_box(p, 0.1, 50) for p in top)])
        return points[int(acquisition(points.unsqueeze(-2)).argmax())]


METHODS: dict[str, Run] = {
    "condensa": ours(),
    "condensa, scan": ours("useful"),
    "condensa, meaningless scan": ours("meaningless"),
    "condensa, bi-log GP": ours(accuracy=False),
    "best single strength": best_density,
    "optuna GP": with_optuna(lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "optuna TPE": with_optuna(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "SCBO": with_botorch(scbo),
    "qLogEI, constrained": with_botorch(qlogei),
    "Ax": with_ax,
}


def regrets(case: SyntheticGroups, history: Sequence[Observation], trials: int) -> dict[str, float]:
    """Regret after each budget, and by how much the last winner truly misses the level."""
    level = case.baseline - case.tolerance
    found = {}
    missed = 0.0
    for budget in (b for b in BUDGETS if b <= trials):
        best = best_feasible(history[:budget], level)
        utility = 0.0 if best is None else history[best].utility
        assert utility is not None
        found[f"after_{budget}"] = case.optimum - utility
        if best is not None:
            combination = case.domain.nearest(history[best].point[None])
            missed = max(0.0, level - float(case.accuracy(combination)))
    return {**found, "missed_points": 100 * missed}


def compare(groups: int, bits: bool, method: str, problems: int, trials: int) -> dict[str, Any]:
    """One method on all problems of one kind: a record of means, spreads and CPU time."""
    rows = []
    started = time.process_time()
    for seed in range(problems):
        case = SyntheticGroups.draw(seed, groups, bits)
        rows.append(regrets(case, METHODS[method](case, seed, trials), trials))
    seconds = (time.process_time() - started) / (problems * trials)
    record: dict[str, Any] = {
        "groups": groups,
        "bits": bits,
        "method": method,
        "problems": problems,
        "trials": trials,
        "cpu_seconds_per_trial": round(seconds, 3),
        "infeasible_share": statistics.fmean(row["missed_points"] > 0 for row in rows),
    }
    for key in (k for k in rows[0] if k.startswith("after")):
        values = [row[key] for row in rows]
        record[key] = {
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        }
    return record


def proposal_seconds() -> dict[str, float]:
    """CPU seconds of one proposal in 12 groups, without and with bits and a scan."""
    found = {}
    for observations in (20, 40, 50):
        for bits in (False, True):
            case = SyntheticGroups.draw(0, 12, bits)
            level = case.domain.random(observations, seed=1) // 3
            history = [case.observe(point) for point in case.domain.points(level)]
            problem = case.problem(scan=case.scan())
            started = time.process_time()
            make_strategy("condensa").suggest(problem, history, None, q=1, seed=0)
            seconds = time.process_time() - started
            found[f"{observations} observations{', bits' if bits else ''}"] = round(seconds, 2)
    return found


def main() -> None:
    """Compare and add to ``benchmarks/results/search_nd.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, nargs="+", default=[6, 8, 12])
    parser.add_argument("--bits", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=available(METHODS))
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--time", action="store_true", help="only time a proposal")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")

    def add(record: dict[str, Any]) -> None:
        def change(payload: dict[str, Any]) -> None:
            record["environment"] = environment_index(payload)
            key = ("groups", "bits", "method")
            others = [r for r in payload.get("rows", []) if any(r[k] != record[k] for k in key)]
            payload["rows"] = [*others, record]

        update_results("search_nd", change)

    if arguments.time:
        seconds = proposal_seconds()
        update_results("search_nd", lambda payload: payload.update(proposal=seconds))
        print(seconds)
        return
    flags = {"no": [False], "yes": [True], "both": [False, True]}[arguments.bits]
    for bits in flags:
        for groups in arguments.groups:
            for method in arguments.methods:
                record = compare(groups, bits, method, arguments.problems, arguments.trials)
                add(record)
                print(record, flush=True)


if __name__ == "__main__":
    main()
