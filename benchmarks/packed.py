"""Size of the packed file against the entropy of what it holds, and the time to load it.

    python benchmarks/packed.py --data DATA

Six trained networks are pruned and rounded without further training: how well a file is coded does
not depend on how accurate it is. The *bound* is what an ideal coder needs that knows the density of
each tensor and how often each of its codes occurs, nothing of their order:

    Σ over tensors  N·H(nnz / N) + nnz·H(codes)   bits, and all else (scales, biases, tables) as is

Beside it: the dense weights as safetensors, the same compressed by zstd-19 with the zeros in them,
and as `torch.save` writes them. Loading is timed in turns with that of the dense safetensors file.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zstandard
from common import RESULTS, environment, silence, update_results
from held_out import HELD_OUT
from safetensors.torch import load_file, save, save_file
from tasks import TASKS, dense_start
from torch import Tensor, nn

from lightning_condensa import (
    Codebook,
    Compose,
    CompressedModel,
    Prune,
    Quantize,
    Scheme,
    load_compressed,
)
from lightning_condensa.schemes import Encoded

PARTS = ("sizes", "loads")
DENSITIES = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5)
VALUES: dict[str, Scheme] = {"int8": Quantize("int8"), "codebook 16": Codebook(16)}


def entropy(counts: Tensor) -> float:
    """Bits a symbol, of symbols that occur so often."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log2()).sum()) if len(shares) else 0.0


def bound_bits(encoded: Encoded) -> float:
    """What an ideal coder of independent symbols needs for one tensor."""
    codes = encoded.codes.flatten()
    kept = codes[codes != 0]
    positions = len(codes) * entropy(torch.tensor([len(kept), len(codes) - len(kept)]))
    values = len(kept) * entropy(torch.unique(kept, return_counts=True)[1])
    scale = 0 if encoded.scale is None else 32 * encoded.scale.numel()
    return positions + values + scale + encoded.table_bits


def sizes(module: nn.Module, scheme: Scheme) -> dict[str, float]:
    """Bytes of the packed file and of others of the same θ."""
    compressed = CompressedModel.compress(module, scheme)
    state = {n: t.contiguous() for n, t in compressed.module.state_dict().items()}
    rest = sum(t.nbytes for n, t in state.items() if n not in compressed.theta)
    saved = io.BytesIO()
    torch.save(state, saved)
    dense = save(state)
    return {
        "file": compressed.file_bytes(),
        "bound": sum(map(bound_bits, compressed.theta.values())) / 8 + rest,
        "paper": compressed.value_bytes,
        "safetensors": len(dense),
        "safetensors_zstd": len(zstandard.ZstdCompressor(level=19).compress(dense)),
        "torch_save": len(saved.getvalue()),
    }


def load_ratio(module: nn.Module, scheme: Scheme, repeats: int) -> list[float]:
    """How many times longer a packed file takes to load than dense safetensors, in turns."""
    compressed = CompressedModel.compress(module, scheme)
    with tempfile.TemporaryDirectory() as folder:
        packed, dense = Path(folder) / "model.condensa", Path(folder) / "model.safetensors"
        compressed.save(packed)
        save_file({n: t.contiguous() for n, t in module.state_dict().items()}, dense)
        ways: list[Callable[[], object]] = [
            lambda: load_compressed(packed, module),
            lambda: module.load_state_dict(load_file(dense)),
        ]
        times = [[_seconds(way) for way in ways] for _ in range(repeats + 1)]
    return [ours / plain for ours, plain in times[1:]]


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def large() -> nn.Module:
    """VGG-19 for 32 x 32 images by shape alone: 20 M weights."""
    widths = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    torch.manual_seed(0)
    ends = zip([3, *widths], widths, strict=False)
    return nn.Sequential(*(nn.Conv2d(a, b, 3) for a, b in ends), nn.Linear(512, 10))


def measured_sizes(data: Path | None) -> list[dict[str, Any]]:
    """Bytes of every trained model, kind of values and density."""
    rows: list[dict[str, Any]] = []
    for task in (*TASKS.values(), HELD_OUT):
        module = dense_start(task, 0, data).module()
        for values, rounding in VALUES.items():
            for density in DENSITIES:
                found = sizes(module, Compose([Prune(density), rounding]))
                rows.append({"model": task.name, "values": values, "density": density, **found})
                print(rows[-1], flush=True)
    return rows


def measured_loads(repeats: int) -> list[dict[str, Any]]:
    """Time to load a large file of every kind of values."""
    loads: list[dict[str, Any]] = []
    for values, rounding in VALUES.items():
        for density in (0.01, 0.05, 0.5):
            ratios = load_ratio(large(), Compose([Prune(density), rounding]), repeats)
            median = statistics.median(ratios)
            loads.append({"values": values, "density": density, "median": median, "ratios": ratios})
            print(loads[-1], flush=True)
    return loads


def main() -> None:
    """Measure and write ``results/packed.json``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of cifar10/ and tinyshakespeare/")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=15, help="of each load")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    for part in options.parts:
        found = measured_sizes(options.data) if part == "sizes" else measured_loads(options.repeats)

        def change(
            results: dict[str, Any], part: str = part, found: list[dict[str, Any]] = found
        ) -> None:
            results.setdefault("environments", {})[part] = environment()
            results[part] = found

        update_results("packed", change, options.out)


if __name__ == "__main__":
    main()
