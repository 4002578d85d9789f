"""The C-step by itself: time and memory, beside two ways to a threshold.

Ours makes masks and θ. ``topk``, which the reference uses, and ``kthvalue`` only find a threshold,
over concatenated magnitudes.

Time is taken in one process, the ways in turn. Memory is taken in a process for each way, and is
exact to a page: the peak of resident memory during the call over what was resident before it, as
the kernel counts them (``VmHWM`` after a reset, and ``VmRSS``), with an allocator that returns what
is freed. It holds the result, and the scratch memory inside torch's kernels, which torch's own
counters do not see. On CUDA it is the peak of what torch allocated. Linux only.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from block_clock import now
from overhead_cases import DENSITY, DTYPES
from torch import Tensor, nn

from lightning_condensa import Prune

SIZES = {
    "cpu": {"1 M": 1_000_000, "25 M": 25_000_000, "100 M": 100_000_000},
    "cuda": {"25 M": 25_000_000, "300 M": 300_000_000},
}
LAYERS = 12

Way = Callable[[], object]


def ways(numel: int, device: str, dtype: torch.dtype) -> dict[str, Way]:
    """The projection of about ``numel`` weights to 5 %, and two ways to its threshold.

    * ``"condensa"``: plain magnitudes;
    * ``"metric"``: times a metric of the weights' shapes, as in training with the default schedule;
    * ``"floors"``: three of the twelve layers fall below the ``min_per_layer`` of 1 % of a layer;
    * ``"topk"`` and ``"kthvalue"``.
    """
    torch.manual_seed(0)
    width = math.isqrt(numel // LAYERS)
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
    weights = {n: torch.randn(p.shape).to(device, dtype) for n, p in module.named_parameters()}
    metric = {n: torch.rand(w.shape).to(device) for n, w in weights.items()}
    starved = weights | {n: 1e-3 * w for n, w in list(weights.items())[: LAYERS // 4]}
    bound = Prune(DENSITY).bind(module)
    guarded = Prune(DENSITY, min_per_layer=width * width // 100).bind(module)
    total = LAYERS * width * width
    kept = round(DENSITY * total)

    def magnitudes() -> Tensor:
        return torch.cat([w.abs().flatten() for w in weights.values()])

    return {
        "condensa": lambda: bound.pi(weights),
        "metric": lambda: bound.pi(weights, metric),
        "floors": lambda: guarded.pi(starved),
        "topk": lambda: magnitudes().topk(kept, sorted=True).values[-1],
        "kthvalue": lambda: magnitudes().kthvalue(total - kept + 1),
    }


def measure(numel: int, device: str, dtype: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of every repeat and peak extra bytes, of each way."""
    chosen = ways(numel, device, DTYPES[dtype])
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for repeat in range(repeats + 1):
        for name, way in chosen.items():
            started = now(device)
            way()
            if repeat > 0:  # the first is for warming up
                seconds[name].append(now(device) - started)
    peaks = {}
    for name in list(chosen):
        way = chosen.pop(name)
        peaks[name] = cuda_peak(way) if device == "cuda" else peak_elsewhere(name, numel, dtype)
    return {
        name: {
            "median_s": statistics.median(times),
            "min_s": min(times),
            "seconds": times,
            "peak_bytes": peaks[name],
        }
        for name, times in seconds.items()
    }


def growth(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The exponent with which each way's time grows, from each size to the next; 1 is linear."""
    return {
        name: [
            math.log(b["ways"][name]["median_s"] / a["ways"][name]["median_s"])
            / math.log(b["weights"] / a["weights"])
            for a, b in pairwise(rows)
        ]
        for name in (rows[0]["ways"] if rows else ())
    }


def cuda_peak(way: Way) -> int:
    """Peak bytes that torch allocates on the GPU during a call."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    return torch.cuda.max_memory_allocated() - before


def peak_elsewhere(name: str, numel: int, dtype: str) -> int:
    """Peak extra bytes of a way on the CPU, measured in a process of its own."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, __file__, "--way", name, "--numel", str(numel), "--dtype", dtype]
    # Above the threshold, freed memory goes back to the kernel at once.
    settings |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    return int(subprocess.run(command, env=settings, check=True, stdout=subprocess.PIPE).stdout)


def resident_peak(way: Way) -> int:
    """Peak of resident memory during a call, over what was resident before, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    result = way()
    peak = _status("VmHWM")
    del result
    return peak - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line for line in lines if line.startswith(f"{key}:")).split()[1]
    return 1024 * int(kilobytes)


def main() -> None:
    """Print the peak extra bytes of one way on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", required=True)
    parser.add_argument("--numel", type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ways(1_000_000, "cpu", DTYPES[args.dtype])[args.way]()  # loads code, fills caches
    print(resident_peak(ways(args.numel, "cpu", DTYPES[args.dtype])[args.way]))


if __name__ == "__main__":
    main()
