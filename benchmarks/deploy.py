"""Speed of compressed models beside the dense ones in the same engine, in turn, on one thread.

    python benchmarks/deploy.py
    python benchmarks/deploy.py --cases "ResNet-20, int8" --seconds 1

Weights are random: speed does not depend on them. Filters are removed layer by layer
(`FilterPrune`; in AlexNet hidden units of its Linear layers, too, and in the ViT only those of each
MLP, by `NeuronPrune`), physically, by `shrink`.
int8 is an ONNX file with the codes and scales of θ. Each case is written when it is done and not
measured again; ``--redo`` does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from common import RESULTS, environment, read_results, silence, update_results
from deploy_networks import NETWORKS, build
from ort import session
from safetensors.torch import save
from torch import Tensor, nn

from lightning_condensa import (
    Compose,
    CompressedModel,
    FilterPrune,
    NeuronPrune,
    Quantize,
    Scheme,
    compare,
)
from lightning_condensa.deploy.engines import Engine, prepare
from lightning_condensa.deploy.flops import count_flops
from lightning_condensa.deploy.threads import torch_threads

NAME = "deploy"
BATCHES = (1, 16)
#: As deployed, a model runs many times in a row: its weights are in the caches where they fit.
TURN_SECONDS = 0.2
CPU = torch.device("cpu")
#: Linear layers whose outputs are hidden units, which go at the same share.
HIDDEN = {"ViT-tiny": r"mlp\.0\.weight", "AlexNet": r"^1[46]\.weight"}
ENGINES = [engine for engine in get_args(Engine) if engine != "sparse"]


@dataclass(frozen=True)
class Case:
    """One compression of one network.

    Attributes:
        network: A name in `NETWORKS`.
        filters: Share of filters that is left, 1 for all.
        coupled: Whether what sums tie together is removed as one.
        int8: Whether weights and activations are integers.
    """

    network: str
    filters: float = 1.0
    coupled: bool = False
    int8: bool = False

    @property
    def method(self) -> str:
        """What is done, in words."""
        share = {1.0: "", 0.5: "filters ½", 0.25: "filters ¼"}[self.filters]
        words = [share + (" coupled" if self.coupled else ""), "int8" if self.int8 else ""]
        return " + ".join(filter(None, words))

    @property
    def name(self) -> str:
        """Of the case."""
        return f"{self.network}, {self.method}"

    def scheme(self) -> Scheme:
        """What it is compressed with."""
        parts: list[Scheme] = []
        if self.filters < 1:
            if self.network != "ViT-tiny":
                parts.append(FilterPrune(self.filters, scope="layer", coupled=self.coupled))
            if hidden := HIDDEN.get(self.network):
                parts.append(NeuronPrune(self.filters, scope="layer", include=[hidden]))
        if self.int8:
            parts.append(Quantize("int8"))
        return Compose(parts) if len(parts) > 1 else parts[0]

    def compress(self, dense: nn.Module, x: Tensor) -> CompressedModel:
        """The compressed model, made smaller."""
        dense.example_input_array = x
        compressed = CompressedModel.compress(dense, self.scheme())
        return compressed.shrink(x) if self.filters < 1 else compressed


CASES = {
    case.name: case
    for case in (
        *(Case(network, filters) for network in NETWORKS for filters in (0.5, 0.25)),
        Case("ResNet-20", 0.5, coupled=True),
        Case("ResNet-20", 0.25, coupled=True),
        Case("MobileNet-like", 0.5, coupled=True),
        Case("MobileNet-like", 0.25, coupled=True),
        Case("VGG-19-BN", int8=True),
        Case("ResNet-20", int8=True),
        Case("VGG-19-BN", 0.25, int8=True),
    )
}


def flops(module: nn.Module, x: Tensor) -> int:
    """Of one forward pass."""
    return sum(count.dense for count in count_flops(module, (x,)).values())


def parameters(module: nn.Module) -> int:
    """How many there are."""
    return sum(p.numel() for p in module.parameters())


def int8_session(compressed: CompressedModel, x: Tensor) -> Callable[[], Any]:
    """A call of ONNX Runtime with our codes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        data = [torch.randn(16, *x.shape[1:]) for _ in range(4)]
        compressed.to_onnx(path, x, precision="int8", calibration=data)
        model = session(path)
    feed = {model.get_inputs()[0].name: x.numpy()}
    return lambda: model.run(None, feed)


def pruned_by_peer(network: str, filters: float, x: Tensor) -> nn.Module | str:
    """torch-pruning at the same share of filters, uniform magnitude; or why it cannot."""
    try:
        import torch_pruning as tp  # type: ignore[import-untyped]
    except ImportError:
        return "not installed"
    module = build(network).requires_grad_(True)
    heads = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == 10]
    try:
        tp.pruner.MagnitudePruner(
            module,
            x,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=1 - filters,
            ignored_layers=heads,
        ).step()
        with torch.no_grad():
            module.eval()(x)
    except Exception as error:  # whatever it is: that is the result
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return module.requires_grad_(False)


def measure(case: Case, engines: list[str], seconds: float) -> dict[str, Any]:
    """Ratios in every engine and batch, sizes, and the limit that operations set."""
    one = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dense = build(case.network)
    compressed = case.compress(build(case.network), one)
    peer = pruned_by_peer(case.network, case.filters, one) if case.filters < 1 else "not its job"
    times = []
    for batch in BATCHES:
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        for engine in ["onnxruntime"] if case.int8 else engines:
            with torch_threads(1):
                calls = {"dense": prepare(dense, (x,), engine, 1, CPU)}  # type: ignore[arg-type]
                calls["ours"] = (
                    int8_session(compressed, x)
                    if case.int8
                    else prepare(compressed.module, (x,), engine, 1, CPU)  # type: ignore[arg-type]
                )
                if isinstance(peer, nn.Module) and not case.int8:
                    calls["torch-pruning"] = prepare(peer, (x,), engine, 1, CPU)  # type: ignore[arg-type]
                compared = compare(calls, min_seconds=seconds, turn_seconds=TURN_SECONDS)
            for name in calls:
                timing, ratio = compared.timing(name), compared.speedup(name, over="dense")
                times.append(
                    {
                        "engine": engine,
                        "batch": batch,
                        "model": name,
                        "ms": 1e3 * timing.median,
                        "iqr_ms": 1e3 * timing.iqr,
                        "times": ratio.median,
                        "times_low": ratio.low,
                        "times_high": ratio.high,
                        "rounds": timing.runs,
                    }
                )
        torch.compiler.reset()
    state = {n: t.contiguous() for n, t in dense.state_dict().items()}
    small = compressed.module
    found = {
        "case": case.name,
        "network": case.network,
        "method": case.method,
        "parameters": [parameters(dense), parameters(small)],
        "flops_limit": flops(dense, one) / flops(small, one),
        "dense_bytes": len(save(state)),
        "file_bytes": compressed.file_bytes(),
        "times": times,
    }
    if isinstance(peer, nn.Module):
        limit = flops(dense, one) / flops(peer, one)
        return {**found, "peer": {"parameters": parameters(peer), "flops_limit": limit}}
    return {**found, "peer": peer}


def main() -> None:
    """Measure what was asked for and is not there, and record each case as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--redo", action="store_true", help="measure what is there, too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    silence()
    warnings.filterwarnings("ignore", module="torch|copyreg|contextlib|lightning_condensa")
    torch.set_num_threads(1)
    for name in options.cases:
        done = {c["case"] for c in read_results(NAME, options.out).get("cases", [])}
        if name in done and not options.redo:
            continue
        begin = time.perf_counter()
        case = measure(CASES[name], options.engines, options.seconds)
        case["seconds"] = round(time.perf_counter() - begin, 1)

        def add(results: dict[str, Any], case: dict[str, Any] = case) -> None:
            kept = [c for c in results.get("cases", []) if c["case"] != case["case"]]
            order = list(CASES)
            cases = sorted([*kept, case], key=lambda c: order.index(c["case"]))
            results.update({"environment": environment(), "cases": cases})

        update_results(NAME, add, options.out)
        print(name, f"{case['seconds']} s, limit {case['flops_limit']:.2f}", flush=True)
        for row in case["times"]:
            if row["model"] != "dense":
                print(
                    f"  {row['engine']:12s} {row['batch']:3d} {row['model']:14s} "
                    f"{row['ms']:8.3f} ms x{row['times']:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
