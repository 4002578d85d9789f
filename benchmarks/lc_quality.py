"""Accuracy of compressed networks at equal optimizer steps: method by method, task by task.

Every method starts from the same dense weights, trains for the same number of optimizer steps and
is judged by the test metric of the θ that it ships, its last. Each cell (task, method, density,
budget, seed) is written as soon as it is there and not computed twice, so a run can be broken off
and taken up, and the methods can be run one by one, in different environments and at the same
time::

    python benchmarks/lc_quality.py --methods ours gradual --tasks digits-cnn
    python benchmarks/lc_quality.py --methods ours --redo ours --data DATA

`tune.py` must have been run before.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment_index, read_results, silence, update_results
from gradual import prunable
from held_out import HELD_OUT
from peers import Methods, optimizer_steps
from reference import covers
from tasks import TASKS, Start, TaskModule, dense_start

import lightning_condensa

NAME = "lc_quality"

# Methods that use nothing of this package but the selection of weights.
PEERS = (
    "gradual",
    "gradual-distilled",
    "model-pruning",
    "one-shot",
    "reference",
)

Method = Callable[[Start, float, int], TaskModule]
Key = tuple[str, str, float, int, int]


def methods(tuning: Path) -> dict[str, Method]:
    """Every method by name; the folder is that of the tuned settings."""
    tuned = Methods(tuning)
    return {
        "ours": tuned.ours,
        "ours-distilled": partial(tuned.ours, distilled=True),
        "gradual": tuned.gradual,
        "gradual-distilled": partial(tuned.gradual, distilled=True),
        "model-pruning": tuned.model_pruning,
        "one-shot": tuned.one_shot,
        "reference": tuned.reference,
        "paper": tuned.paper,
    }


def source_of(method: str) -> str:
    """A hash of the code that a method's result depends on: this package's or the peers'."""
    here = Path(__file__).parent
    files = [here / f"{m}.py" for m in ("gradual", "networks", "peers", "reference", "tasks")]
    if method not in PEERS:
        package = Path(lightning_condensa.__file__).parent
        parts = ("callbacks", "functional", "lc", "schemes")
        files = sorted(path for part in parts for path in (package / part).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def key_of(cell: dict[str, Any]) -> Key:
    """What makes a cell the one it is."""
    return cell["task"], cell["method"], cell["density"], cell["budget"], cell["seed"]


def run_cell(
    name: str, method: Method, start: Start, density: float, budget: int
) -> dict[str, Any]:
    """Compress once and measure θ.

    Raises:
        RuntimeError: If θ does not have the density.
    """
    task = start.task
    begin = time.perf_counter()
    theta = method(start, density, budget * task.epochs)
    seconds = time.perf_counter() - begin
    weights = prunable(theta)
    total = sum(w.numel() for w in weights)
    kept = sum(int(w.count_nonzero()) for w in weights)
    # The reference package rounds down.
    wanted = int(density * total) if name == "reference" else round(density * total)
    if kept != wanted:
        raise RuntimeError(f"{name} kept {kept} of {total} weights, density {density} is {wanted}")
    return {
        "task": task.name,
        "method": name,
        "density": density,
        "budget": budget,
        "seed": start.seed,
        "test": task.measure(theta, start.splits.test),
        "val": task.measure(theta, start.splits.val),
        "nonzeros": kept,
        "weights": total,
        "optimizer_steps": optimizer_steps(start, budget * task.epochs),
        "seconds": round(seconds, 1),
        "source": source_of(name),
    }


class Study:
    """The result file, which other processes may be writing, too."""

    def __init__(self, folder: Path, name: str = NAME) -> None:
        self.folder = folder
        self.name = name

    def cells(self) -> dict[Key, dict[str, Any]]:
        """All cells so far."""
        cells = read_results(self.name, self.folder).get("cells", [])
        return {key_of(cell): cell for cell in cells}

    def drop(self, keys: set[Key]) -> None:
        """Forget some cells."""
        self._put([], lambda cell: key_of(cell) not in keys)

    def add(self, cell: dict[str, Any]) -> None:
        """Write a cell in the place of an older one."""
        self._put([cell], lambda other: key_of(other) != key_of(cell))

    def ensure(self, key: Key, compute: Callable[[], dict[str, Any]]) -> None:
        """Compute, write and show a cell, unless it is there."""
        if key not in self.cells():
            self.add(cell := compute())
            print({k: cell[k] for k in (*_SHOWN, "test", "val", "seconds")}, flush=True)

    def _put(self, added: list[dict[str, Any]], keep: Callable[[dict[str, Any]], bool]) -> None:
        def change(results: dict[str, Any]) -> None:
            here = environment_index(results) if added else 0
            cells = [cell for cell in results.get("cells", []) if keep(cell)]
            cells += [{**cell, "environment": here} for cell in added]
            results.setdefault("dense", [])
            results["cells"] = sorted(cells, key=key_of)

        update_results(self.name, change, self.folder)

    def add_dense(self, start: Start, budget: int) -> None:
        """Write the metrics of the dense network that a seed's cells of a budget begin from.

        Another processor trains another network: what was begun on one has to be ended there.

        Raises:
            RuntimeError: If this budget's cells so far began from other weights.
        """
        task = start.task
        digest = hashlib.sha256()
        for name in sorted(start.weights):
            digest.update(start.weights[name].contiguous().numpy().tobytes())
        place = {"task": task.name, "seed": start.seed, "budget": budget}
        record = {**place, "weights": digest.hexdigest()[:12]}
        known = read_results(self.name, self.folder).get("dense", [])
        for other in known:
            if place.items() <= other.items():
                if other["weights"] != record["weights"]:
                    raise RuntimeError(
                        f"seed {start.seed} of {task.name} has another dense network than the "
                        f"results in {self.folder.name}: recompute them in another folder"
                    )
                return
        record["metric"] = task.metric
        record["test"] = task.measure(start.module(), start.splits.test)
        record["val"] = task.measure(start.module(), start.splits.val)

        def change(results: dict[str, Any]) -> None:
            results.setdefault("environments", [])
            results.setdefault("dense", []).append(record)
            results["dense"].sort(key=lambda r: (r["task"], r["seed"], r["budget"]))

        update_results(self.name, change, self.folder)


def run(study: Study, wanted: Sequence[Key], data: Path | None, table: dict[str, Method]) -> None:
    """Compute the wanted cells that are missing, in their order."""
    known = {**TASKS, HELD_OUT.name: HELD_OUT}
    start: Start | None = None
    for key in wanted:
        task, name, density, budget, seed = key
        if key in study.cells():
            continue
        if start is None or (start.task.name, start.seed) != (task, seed):
            start = dense_start(known[task], seed, data)
        study.add_dense(start, budget)
        if name == "reference" and not covers(start.module()):
            continue
        study.ensure(key, partial(run_cell, name, table[name], start, density, budget))


_SHOWN = ("task", "method", "density", "budget", "seed")


def warn_of_stale(cells: dict[Key, dict[str, Any]]) -> None:
    """Say which methods have cells that other code computed."""
    for name in sorted({method for _, method, *_ in cells}):
        now = source_of(name)
        stale = sum(c["source"] != now for k, c in cells.items() if k[1] == name)
        if stale:
            print(f"{stale} cells of {name} are of other sources: --redo {name} recomputes them")


def main() -> None:
    """Run what was asked for and write the results after every cell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = list(methods(RESULTS))
    add = parser.add_argument
    add("--methods", nargs="+", choices=names, default=names)
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--densities", type=float, nargs="+", help="instead of each task's own")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--budgets", type=int, nargs="+", default=[1, 4], help="in multiples of a task's epochs")
    add("--redo", nargs="+", choices=names, default=[], help="forget these methods' cells first")
    add("--data", type=Path, help="folder of cifar10/ and tinyshakespeare/")
    add("--out", type=Path, default=RESULTS, help="folder of the result file")
    add("--tuning", type=Path, help="folder of the tuned settings, if not --out")
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    study = Study(options.out)
    wanted = [
        (task, method, density, budget, seed)
        for budget in options.budgets
        for task in options.tasks
        for seed in options.seeds
        for method in options.methods
        for density in options.densities or TASKS[task].densities
    ]
    if options.redo:
        study.drop({key for key in wanted if key[1] in options.redo})
    run(study, wanted, options.data, methods(options.tuning or options.out))
    warn_of_stale(study.cells())


if __name__ == "__main__":
    main()
