"""The main job for several seeds: what `make demo` gains and loses, with its spread.

    python benchmarks/demo.py

Runs ``examples/digits/search.py`` as a user would, once per seed, and gathers its figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import mean_sd, write_results

SEARCH = Path(__file__).parents[1] / "examples" / "digits" / "search.py"


def run(seed: int, folder: Path) -> dict[str, Any]:
    """Figures of one seed, and how long it took."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, str(SEARCH), "--seed", str(seed), "--out", str(folder)], check=True
    )
    figures = json.loads((folder / "figures.json").read_text())
    return {**figures, "seconds": time.perf_counter() - started}


def main() -> None:
    """Run every seed and write ``results/demo.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = [run(seed, Path(scratch) / str(seed)) for seed in args.seeds]
    ratios = [r["dense"]["bytes on disk"] / r["compressed"]["bytes on disk"] for r in runs]
    losses = [100 * (r["dense"]["test accuracy"] - r["compressed"]["test accuracy"]) for r in runs]
    payload = {
        "runs": runs,
        "ratio_of_bytes": mean_sd(ratios),
        "test_accuracy_loss_points": mean_sd(losses),
    }
    write_results("demo", payload)


if __name__ == "__main__":
    main()
