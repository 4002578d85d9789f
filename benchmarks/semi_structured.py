"""Time 2:4 weights beside dense ones on a CUDA device, in one process, in turn.

The feed-forward blocks of Transformers, in half precision: `to_semi_structured` chooses by
measurement, so that what it makes is at worst the dense block. Needs sparse tensor cores.

    python benchmarks/semi_structured.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import environment, update_results
from torch import nn

from lightning_condensa import CompressedModel, NMPrune, compare

NAME = "semi_structured"
WIDTHS = (384, 768, 1024, 4096)
TOKENS = (16, 256, 4096)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def block(width: int, seed: int) -> nn.Sequential:
    """What follows attention."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def measure(width: int, tokens: int, dtype: str, seed: int, seconds: float) -> dict[str, Any]:
    """Median milliseconds dense and as chosen, and the ratio with its quartiles."""
    compressed = CompressedModel.compress(block(width, seed), NMPrune(2, 4))
    example = torch.randn(tokens, width)
    sparse = compressed.to_semi_structured(example, DTYPES[dtype])
    dense = compressed.module.cuda().to(DTYPES[dtype]).requires_grad_(False)
    x = example.cuda().to(DTYPES[dtype])
    functions: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense(x),
        "chosen": lambda: sparse(x),
    }
    compared = compare(functions, min_seconds=seconds, turn_seconds=0.05)
    ratio = compared.speedup("chosen", "dense")
    return {
        "width": width,
        "tokens": tokens,
        "dtype": dtype,
        "seed": seed,
        "methods": [row.method for row in sparse.report.rows],
        "ms": {name: 1e3 * compared.timing(name).median for name in functions},
        "times": ratio.median,
        "times_low": ratio.low,
        "times_high": ratio.high,
    }


def main() -> None:
    """Measure every case, and record each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a case")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        for dtype in options.dtypes:
            for width in options.widths:
                for tokens in options.tokens:
                    run = measure(width, tokens, dtype, seed, options.seconds)
                    runs.append(run)
                    print(run, flush=True)
                    record = {"environment": environment(), "runs": runs}
                    update_results(NAME, lambda results, record=record: results.update(record))


if __name__ == "__main__":
    main()
