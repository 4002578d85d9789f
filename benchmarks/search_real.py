"""Searches over real training runs: the best feasible size against optimizer steps spent.

Every method gets the same dense network, the same trial runner and the same number of trials; what
differs is which densities it tries, and with what shortcuts::

    python benchmarks/search_real.py --seeds 0 1 2
    python benchmarks/search_real.py --tasks cifar-vgg shakespeare-lstm --data DATA

A trial prunes to one density and stores half precision, and the objective is the packed file; or
it prunes filters, eight at a time, and the objective is the measured latency in ONNX Runtime. The
best feasible model so far is tested on images or text by which nothing was chosen.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from common import RESULTS, environment, silence, update_results
from tasks import TASKS, Start, Task, TaskModule, dense_start
from torch import Tensor

from lightning_condensa import (
    Compose,
    CondensaSearch,
    FilterPrune,
    Latency,
    MemoryFootprint,
    Prune,
    Quantize,
    Range,
    Scheme,
)
from lightning_condensa.objectives import Objective
from lightning_condensa.search import Observation, Problem, SearchResult, Strategy
from lightning_condensa.search.strategies.base import require_one_coordinate

COLD: dict[str, Any] = {"warm_start": 0, "scan": False}
METHODS: dict[str, dict[str, Any]] = {
    "condensa": {},
    "condensa, early abort": {"early_abort": True},
    "condensa, cold": COLD,
    "paper": {**COLD, "method": "paper"},
    "bisection": {**COLD, "method": "bisection"},
    "optuna GP": COLD,
}


@dataclass(frozen=True)
class Case:
    """What is searched for.

    Attributes:
        task: Name of the network and data.
        tolerance: Loss that is allowed, in the metric's units; accuracies are shares.
        least: The least density.
        latency: Whether filters are pruned for latency, not elements for the file.
    """

    task: str
    tolerance: float
    least: float
    latency: bool = False

    def scheme(self) -> Scheme:
        """What a trial does, with the density open."""
        density = Range(self.least, 1.0, log=True)
        if self.latency:
            return FilterPrune(density, scope="layer", align=8)
        return Compose([Prune(density), Quantize("float16")])

    def objective(self, start: Start) -> Objective:
        """Bytes, or seconds for one input on one thread."""
        if self.latency:
            x = start.splits.val.tensors[0][:1]
            return Latency(x, threads=1, min_seconds=1.0, engine="onnxruntime")
        return MemoryFootprint()


CASES = {
    "digits-cnn": Case("digits-cnn", 0.01, 0.001),
    "digits-transformer": Case("digits-transformer", 0.01, 0.001),
    "cifar-vgg": Case("cifar-vgg", 0.02, 0.001),
    "cifar-vgg, latency": Case("cifar-vgg", 0.02, 0.05, latency=True),
    "cifar-resnet8": Case("cifar-resnet8", 0.02, 0.001),
    "shakespeare-lstm": Case("shakespeare-lstm", 0.05, 0.01),
}
#: Validations in a full training run.
VALIDATIONS = 24
METRIC = "val_metric"


class ShareModule(TaskModule):
    """The task with its accuracy as a share, as a search takes accuracies to be."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the metric."""
        x, y = batch
        logits, y = self(x), y.flatten()
        if self.task.metric == "acc":
            value = (logits.argmax(1) == y).float().mean()
        else:
            value = torch.nn.functional.cross_entropy(logits, y) / torch.log(torch.tensor(2.0))
        self.log(METRIC, value, batch_size=len(x))


class OptunaGP(Strategy):
    """Optuna's GP sampler with the metric as a constraint, on the log of the density."""

    def _select(
        self,
        problem: Problem,
        history: Sequence[Observation],
        pending: Tensor,
        free: Tensor,
        q: int,
        seed: int,
    ) -> list[int]:
        u = require_one_coordinate(problem, "optuna GP")
        low, high = float(u.min()), float(u.max())
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=3)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for seen in history:
            study.enqueue_trial({"u": float(seen.point[0])})
            trial = study.ask()
            trial.suggest_float("u", low, high)
            metric = problem.level - 1.0 if seen.metric is None else seen.metric
            trial.set_constraint("metric", problem.level - metric)
            study.tell(trial, problem.utility_of(seen))
        asked = study.ask().suggest_float("u", low, high)
        return (u - asked).abs().masked_fill(~free, torch.inf).argsort()[:q].tolist()


@dataclass(frozen=True)
class Cell:
    """One search to run."""

    name: str
    method: str
    seed: int
    trials: int

    @property
    def task(self) -> Task:
        """The network and data."""
        return TASKS[CASES[self.name].task]

    def run(self, start: Start) -> dict[str, Any]:
        """Search, and tell what was found after each trial, and for how many optimizer steps."""
        case = CASES[self.name]
        module = ShareModule(self.task)
        module.load_state_dict(start.weights)
        if case.latency:
            module.example_input_array = start.splits.val.tensors[0][:1]
        with tempfile.TemporaryDirectory() as folder:
            search = CondensaSearch(
                case.scheme(),
                case.objective(start),
                METRIC,
                mode=self.task.mode,
                tolerance=case.tolerance,
                max_trials=self.trials,
                trainer={
                    "max_epochs": self.task.epochs,
                    "check_val_every_n_epoch": max(1, self.task.epochs // VALIDATIONS),
                    "accelerator": "cpu",
                    "logger": False,
                },
                seed=1000 * self.seed,
                dirpath=folder,
                progress=False,
                **METHODS[self.method],
            )
            if self.method == "optuna GP":
                search.strategy = OptunaGP()
            result = search.fit(module.eval(), datamodule=start.data())
            rows = self._rows(result, start)
        return {
            "task": self.name,
            "method": self.method,
            "seed": self.seed,
            "tolerance": case.tolerance,
            "dense": {
                "metric": result.baseline.metric,
                "objective": result.baseline.objective,
                "test": self.task.measure(start.module(), start.splits.test),
            },
            "trials": rows,
        }

    def _rows(self, result: SearchResult, start: Start) -> list[dict[str, Any]]:
        rows, spent = [], 0
        best, tested = None, None
        for trial in result.trials:
            spent += trial.steps
            size = trial.objective if trial.state == "feasible" else None
            if size is not None and (best is None or size < best):
                best = size
                tested = self.task.measure(trial.load(start.module()), start.splits.test)
            rows.append(
                {
                    "values": trial.values,
                    "parent": trial.parent,
                    "state": trial.state,
                    "metric": trial.metric,
                    "curve": trial.curve,
                    "steps": trial.steps,
                    "steps_so_far": spent,
                    "best_objective": best,
                    "test": tested,
                }
            )
        return rows


def steps_to_reach(row: Mapping[str, Any], objective: float) -> int | None:
    """Optimizer steps until an objective at most this large was found."""
    for trial in row["trials"]:
        if trial["best_objective"] is not None and trial["best_objective"] <= objective:
            steps: int = trial["steps_so_far"]
            return steps
    return None


def main() -> None:
    """Run the cells asked for, and write ``search_real.json`` after every one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=CASES, default=["digits-cnn"])
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", type=int, nargs="+", default=[0])
    add("--trials", type=int, default=10)
    add("--data", type=Path, help="folder of cifar10/ and tinyshakespeare/")
    add("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    silence()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.tasks:
            start = dense_start(TASKS[CASES[name].task], seed, options.data)
            for method in options.methods:
                row = Cell(name, method, seed, options.trials).run(start)
                update_results("search_real", lambda found, row=row: _put(found, row), options.out)
                last = row["trials"][-1]
                print(
                    f"{name} seed {seed} {method}: {last['best_objective']}, "
                    f"test {last['test']}, {last['steps_so_far']} steps",
                    flush=True,
                )


def _put(found: dict[str, Any], row: dict[str, Any]) -> None:
    """Replace the row of the same cell; what a run saw of the machine stands beside it."""

    def key(r: Mapping[str, Any]) -> tuple[Any, ...]:
        return r["task"], r["method"], r["seed"]

    rows = [r for r in found.get("rows", []) if key(r) != key(row)]
    row = {**row, "environment": environment()}
    found["rows"] = sorted([*rows, row], key=key)


if __name__ == "__main__":
    main()
