"""Time sparse execution beside dense engines, in one process, in turn.

Weights are random: the largest of each layer are kept, but a third of the first convolution and
all of the classifier, which hold little. In each round every engine has a turn; a repeat builds the
network, exports and compiles it and chooses sparse layers anew.

    python benchmarks/sparse_execution.py
    python benchmarks/sparse_execution.py --seeds 0 --seconds 2 --batches 1 --threads 1

Repeats are added to those that were run on the same processor.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from common import environment, environment_index, update_results
from networks import perceptron, vgg19_bn
from torch import Tensor, nn

from lightning_condensa import CompressedModel, Prune, compare
from lightning_condensa.deploy.engines import prepare
from lightning_condensa.deploy.sparse.fusion import gather_layers
from lightning_condensa.deploy.sparse.layers import DenseLayer
from lightning_condensa.deploy.sparse.matrix import MatrixLayer
from lightning_condensa.deploy.threads import torch_threads

NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "VGG-19-BN": vgg19_bn,
    "perceptron": perceptron,
}
DENSITIES = (0.05, 0.02, 0.01)
#: As deployed, a model runs many times in a row: its weights are in the caches where they fit.
TURN_SECONDS = 0.2
DENSE = ("eager", "compile", "onnxruntime")
CPU = torch.device("cpu")


def build(network: str, seed: int) -> nn.Sequential:
    """A network with weights and statistics as if it had been trained."""
    torch.manual_seed(seed)
    module = NETWORKS[network]().eval().requires_grad_(False)
    for part in module:
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            part.weight.uniform_(0.5, 1.5)
            part.bias.normal_(0, 0.1)
    return module


def prune(module: nn.Sequential, density: float) -> nn.Module:
    """A copy with few weights; outputs keep their magnitude, and no activation dies out."""
    last = len(module) - 1
    convolution = isinstance(module[0], nn.Conv2d)
    scheme = Prune(
        density,
        scope="layer",
        exclude=[rf"^{last}\."],
        overrides={r"^0\.": 0.3} if convolution else {},
    )
    pruned = CompressedModel.compress(module, scheme).module
    for part in pruned.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            fan_in = float((part.weight != 0).sum()) / len(part.weight)
            part.weight.mul_((2 / fan_in) ** 0.5 / part.weight[part.weight != 0].std())
    return pruned


def all_csr(module: nn.Module) -> nn.Module:
    """Every layer that is sparse as a CSR matrix, with batch norm and ReLU joined as in ours."""
    gathered = gather_layers(module, trace=True)
    for name, part in list(gathered.named_modules()):
        if isinstance(part, DenseLayer) and not bool((part.layer.weight != 0).all()):
            gathered.set_submodule(name, MatrixLayer(part))
    return gathered


def engines(
    network: str, x: Tensor, threads: int, seed: int, dense: list[str]
) -> dict[str, Callable[[], Any]]:
    """Everything that takes turns in one case."""
    module = build(network, seed)
    found = {e: prepare(module, (x,), e, threads, CPU) for e in dense}  # type: ignore[arg-type]
    for density in DENSITIES:
        pruned = prune(module, density)
        found[f"sparse {density}"] = prepare(pruned, (x,), "sparse", threads, CPU)
        found[f"csr {density}"] = prepare(all_csr(pruned), (x,), "eager", threads, CPU)
    return found


def measure(
    network: str, batch: int, threads: int, seed: int, seconds: float, dense: list[str]
) -> dict[str, Any]:
    """Median milliseconds of every engine, and how many times faster than ONNX Runtime it is."""
    torch.manual_seed(seed)
    x = torch.randn(batch, 3, 32, 32)
    with torch_threads(threads):
        compared = compare(
            engines(network, x, threads, seed, dense),
            min_seconds=seconds,
            turn_seconds=TURN_SECONDS,
        )
    base = "onnxruntime" if "onnxruntime" in dense else dense[0]
    rows = []
    for engine in compared.seconds:
        timing, ratio = compared.timing(engine), compared.speedup(engine, base)
        rows.append(
            {
                "engine": engine,
                "ms": 1e3 * timing.median,
                "min_ms": 1e3 * timing.minimum,
                "iqr_ms": 1e3 * timing.iqr,
                "times": ratio.median,
                "times_low": ratio.low,
                "times_high": ratio.high,
            }
        )
    case = {"network": network, "batch": batch, "threads": threads, "seed": seed, "over": base}
    return {**case, "rounds": compared.timing(base).runs, "engines": rows}


def main() -> None:
    """Measure the cases that were asked for, and record each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--engines", nargs="+", choices=DENSE, default=list(DENSE))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="of repeats")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each repeat of a case")
    parser.add_argument("--name", default="sparse_execution", help="of the file with the results")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch|copyreg|contextlib")
    cases = [
        (network, batch, threads, seed)
        for seed in arguments.seeds
        for network in arguments.networks
        for batch in arguments.batches
        for threads in arguments.threads
    ]
    for network, batch, threads, seed in cases:
        run = measure(network, batch, threads, seed, arguments.seconds, arguments.engines)
        print(network, f"batch {batch}, {threads} thread(s), seed {seed}", flush=True)
        for row in run["engines"]:
            print(f"  {row['engine']:14s} {row['ms']:9.3f} ms  x{row['times']:.2f}", flush=True)
        update_results(arguments.name, partial(add, run=run))


def add(results: dict[str, Any], run: dict[str, Any]) -> None:
    """Put a run among those on the same processor; one of the same case and seed is replaced."""
    here = environment()["cpu"]
    if any(other["cpu"] != here for other in results.get("environments", [])):
        results.clear()
    case = ("network", "batch", "threads", "seed")
    kept = [r for r in results.get("runs", []) if any(r[k] != run[k] for k in case)]
    run["environment"] = environment_index(results)
    results.update(payload([*kept, run]))


def payload(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written: every run, and medians over repeats."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        for row in run["engines"]:
            key = (run["network"], run["batch"], run["threads"], row["engine"])
            groups.setdefault(key, []).append(row)
    summary = [
        {
            **dict(zip(("network", "batch", "threads", "engine"), key, strict=True)),
            "ms": median(r["ms"] for r in rows),
            "times": median(r["times"] for r in rows),
            "times_range": [min(r["times"] for r in rows), max(r["times"] for r in rows)],
        }
        for key, rows in groups.items()
    ]
    return {"summary": summary, "runs": runs}


if __name__ == "__main__":
    main()
