"""How many cases the contract suite and the tests of schemes have, and how long they take.

    python benchmarks/contract.py

Each folder's tests run in one process and one thread. All must pass.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from common import write_results

from lightning_condensa.testing import LAWS, LAYERS, NETWORKS

NAME = "contract"
ROOT = Path(__file__).resolve().parents[1]
SUITES = {
    "the laws, every scheme": "tests/test_testing.py",
    "every scheme on every layer": "tests/test_layers_table.py",
    "schemes": "tests/schemes",
    "projections": "tests/functional",
}


def measure(path: str) -> dict[str, Any]:
    """Cases and seconds of some tests, without the start of the process.

    Raises:
        RuntimeError: If one fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Sharded tests start processes of their own, whose start is most of their time.
        options = ["--ignore=tests/functional/test_distributed.py", f"--junitxml={report}"]
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, path],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if ended.returncode != 0:
            raise RuntimeError(ended.stdout[-2000:] + ended.stderr[-2000:])
        cases = list(ElementTree.parse(report).iter("testcase"))
    return {"cases": len(cases), "seconds": round(sum(float(c.get("time", 0)) for c in cases), 1)}


def main() -> None:
    """Run and write."""
    rows = []
    for name, path in SUITES.items():
        rows.append({"suite": name, "path": path, **measure(path)})
        print(rows[-1], flush=True)
    counts = {"laws": len(LAWS), "layers": len(LAYERS), "networks": len(NETWORKS)}
    write_results(NAME, {**counts, "suites": rows})


if __name__ == "__main__":
    main()
