"""Every projection by itself: its time beside that of one pass over memory.

    python benchmarks/projections.py
    python benchmarks/projections.py --memory huge
    python benchmarks/projections.py --memory small

The unit is a copy into memory that the process holds, the fastest there is: all weights read once
and as many written. By default θ gets memory that the process holds, too: glibc's allocator is told
to keep what is freed. Otherwise it is new, and what the kernel takes to hand it out counts against
the projection: less in huge pages, which torch asks for where ``THP_MEM_ALLOC_ENABLE`` is 1.
*Passes* is how often the algorithm behind a projection has to go through the weights; it is stated
here, with the reason. The projection and the copy are timed in turn in one process, on one thread.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import environment, update_results
from torch import Tensor, nn

from lightning_condensa import (
    Add,
    BlockPrune,
    Codebook,
    Compose,
    FilterPrune,
    LowRank,
    NeuronPrune,
    NMPrune,
    Prune,
    Quantize,
    Scheme,
)

LAYERS = 12
#: What allocators are told where θ gets its memory; read when they are loaded.
MEMORY = {
    "held": {
        "THP_MEM_ALLOC_ENABLE": "0",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    },
    "huge": {"THP_MEM_ALLOC_ENABLE": "1"},
    "small": {"THP_MEM_ALLOC_ENABLE": "0"},
}


@dataclass(frozen=True)
class Case:
    """A scheme and the passes that its projection must make.

    Attributes:
        scheme: What is projected onto.
        passes: Passes over the weights; ``None`` where arithmetic and not memory is the limit.
        why: What the passes are for.
    """

    scheme: Scheme
    passes: int | None
    why: str


_GRID = "largest magnitude; error of {} scales; {}codes"
_THREE = _GRID.format(12, "best scale for fixed codes, 3 times; ") + "; root mean square"
CASES = {
    "elements, global": Case(Prune(0.05), 3, "where the threshold lies; count at it; mask and θ"),
    "elements, by layer": Case(
        Prune(0.05, scope="layer"), 3, "where the threshold lies; count at it; mask and θ"
    ),
    "2:4": Case(NMPrune(2, 4), None, "a sort in each group"),
    "blocks of 4 x 4": Case(BlockPrune(0.05, (4, 4)), 2, "norms; mask and θ"),
    "neurons": Case(NeuronPrune(0.25), 2, "norms; mask and θ"),
    "float16": Case(Quantize("float16"), 1, "round"),
    "float8": Case(Quantize("float8_e4m3fn"), 2, "largest magnitude; codes"),
    "int8": Case(Quantize("int8"), 6, _GRID.format(4, "")),
    "int4": Case(Quantize("int4"), 25, _GRID.format(20, "best scale for fixed codes, 3 times; ")),
    "int2": Case(Quantize("int2"), 18, _THREE),
    "ternary": Case(Quantize("ternary"), 18, _THREE),
    "binary": Case(Quantize("binary"), 2, "mean magnitude; signs"),
    "int4, groups of 64": Case(
        Quantize("int4", granularity="group:64"),
        25,
        _GRID.format(20, "best scale for fixed codes, 3 times; "),
    ),
    "5 % + int8": Case(Compose([Prune(0.05), Quantize("int8")]), 9, "those of both"),
    "codebook of 2": Case(Codebook(2), None, "k-means"),
    "codebook of 16": Case(Codebook(16), None, "k-means"),
    "rank 32": Case(LowRank(rank=32), None, "singular values"),
    "low rank, 10 %": Case(LowRank(density=0.1), None, "singular values"),
    "codebook of 2 + 1 %": Case(Add([Codebook(2), Prune(0.01)]), None, "k-means, in turns"),
}
CONVOLUTIONS = {
    "filters": Case(FilterPrune(0.25), 2, "norms; mask and θ"),
    "int8, convolutions": Case(Quantize("int8"), 6, _GRID.format(4, "")),
}


def linear(numel: int) -> nn.Module:
    """Twelve square layers of about ``numel`` weights, without memory."""
    width = math.isqrt(numel // LAYERS) // 64 * 64
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))


def convolutional(numel: int) -> nn.Module:
    """Twelve square 3 x 3 convolutions of about ``numel`` weights, without memory."""
    width = math.isqrt(numel // LAYERS // 9)
    with torch.device("meta"):
        return nn.Sequential(*(nn.Conv2d(width, width, 3, bias=False) for _ in range(LAYERS)))


def measure(case: Case, module: nn.Module, repeats: int) -> dict[str, Any]:
    """Seconds of the projection and of a copy, in turn."""
    torch.manual_seed(0)
    weights = {n: torch.randn(p.shape) for n, p in module.named_parameters()}
    held = {n: torch.zeros_like(w) for n, w in weights.items()}
    bound = case.scheme.bind(module)
    ways: dict[str, Callable[[], object]] = {
        "copy": lambda: [held[name].copy_(weight) for name, weight in weights.items()],
        "projection": lambda: bound.pi(weights),
    }
    seconds: dict[str, list[float]] = {"copy": [], "projection": []}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if repeat > 0:  # the first is for warming up
                seconds[name].append(time.perf_counter() - started)
    return {
        "weights": sum(map(Tensor.numel, weights.values())),
        "passes": case.passes,
        "why": case.why,
        "copy_s": statistics.median(seconds["copy"]),
        "median_s": statistics.median(seconds["projection"]),
        "seconds": seconds,
    }


def main() -> None:
    """Measure every projection and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", choices=MEMORY, default="held", help="that θ is written to")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *CONVOLUTIONS])
    options = parser.parse_args()
    told = MEMORY[options.memory]
    names = set().union(*MEMORY.values())
    if {n: os.environ[n] for n in names if n in os.environ} != told:
        others = {n: value for n, value in os.environ.items() if n not in names}
        os.execve(sys.executable, [sys.executable, *sys.argv], others | told)
    torch.set_num_threads(1)
    rows = []
    for cases, make in ((CASES, linear), (CONVOLUTIONS, convolutional)):
        for name, case in cases.items():
            if options.cases and name not in options.cases:
                continue
            row = {"case": name, **measure(case, make(options.numel), options.repeats)}
            rows.append(row)
            print(f"{name}: {row['median_s']:.3f} s, a copy {row['copy_s']:.3f} s", flush=True)

    def change(results: dict[str, Any]) -> None:
        before = {row["case"]: row for row in results.get(options.memory, {}).get("rows", [])}
        merged = before | {row["case"]: row for row in rows}
        kept = [merged[name] for name in (*CASES, *CONVOLUTIONS) if name in merged]
        results[options.memory] = {"environment": environment(), "rows": kept}

    update_results("projections", change)


if __name__ == "__main__":
    main()
