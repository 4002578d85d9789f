"""Copy figures from ``results/*.json`` into the Markdown files that show them.

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``; running this script
writes it anew, ``--check`` only compares and fails where a file and the results differ.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from common import read_results
from render_deploy import deploy, end_to_end, sparse_execution
from render_overhead import lc_overhead, projections
from render_quality import lc_quality, lc_quality_tasks, lc_study
from render_real import search_faults, search_real
from render_schemes import char_lstm, contract, lenet300, mutations, packed, quantizers, structured
from render_search import (
    search_1d,
    search_1d_risk,
    search_fidelity,
    search_hosts,
    search_nd,
    search_scaling,
)
from tables import source, spread, table

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo() -> str:
    """Every seed of the demo, and the mean."""
    results = read_results("demo")
    rows = []
    for r in results["runs"]:
        dense, compressed = r["dense"], r["compressed"]
        rows.append(
            [
                f"seed {r['seed']}",
                f"{100 * dense['test accuracy']:.2f} %",
                f"{100 * compressed['test accuracy']:.2f} %",
                f"{dense['bytes on disk']:,}",
                f"{compressed['bytes on disk']:,}",
                f"{dense['bytes on disk'] / compressed['bytes on disk']:.1f} ×",
                f"{r['seconds']:.0f} s",
            ]
        )
    loss, ratio = results["test_accuracy_loss_points"], results["ratio_of_bytes"]
    rows.append(["mean ± sd", "", f"−{spread(loss, 2)} points", "", "", f"{spread(ratio)} ×", ""])
    header = ["", "test, dense", "test, compressed", "bytes, dense", "bytes", "smaller", "time"]
    return table(header, rows) + source(results)


def paper() -> str | None:
    """The preset and the reference on the same batches."""
    results = read_results("paper")
    if not results:
        return None
    rows = [
        [
            f"{r['density']:.1%}",
            f"{r['differs_in']} of {r['kept']:,}",
            spread(r["reference"]),
            spread(r["paper"]),
        ]
        for r in results["summary"]
    ]
    header = ["density", "first θ differs in", "reference", '`preset="paper"`']
    seeds = len({r["seed"] for r in results["rows"]})
    note = f"\nTest accuracy in % of the last θ, mean ± sd of {seeds} seeds.\n"
    return table(header, rows) + note + source(results)


FIGURES: dict[str, Callable[[], str | None]] = {
    "demo": demo,
    "lc-quality": lc_quality,
    "lc-quality-tasks": lc_quality_tasks,
    "lc-study": lc_study,
    "paper": paper,
    "quantizers": quantizers,
    "structured": structured,
    "lenet300": lenet300,
    "char-lstm": char_lstm,
    "projections": projections,
    "contract": contract,
    "mutations": mutations,
    "packed": packed,
    "lc-overhead": lc_overhead,
    "search-1d": search_1d,
    "search-1d-risk": search_1d_risk,
    "search-fidelity": search_fidelity,
    "search-nd": search_nd,
    "search-scaling": search_scaling,
    "search-hosts": search_hosts,
    "search-real": search_real,
    "search-faults": search_faults,
    "sparse-execution": sparse_execution,
    "deploy": deploy,
    "end-to-end": end_to_end,
}


def render(text: str) -> str:
    """The text with every block's figures taken from the results, where there are results."""

    def block(match: re.Match[str]) -> str:
        figures = FIGURES[match["name"]]()
        return match[0] if figures is None else f"{match[1]}{figures}{match[3]}"

    return BLOCK.sub(block, text)


def main() -> None:
    """Write, or with ``--check`` compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text()
        new = render(old)
        if new != old:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(new)
    if check and stale:
        sys.exit(f"figures differ from benchmarks/results in {', '.join(map(str, stale))}: run it")


if __name__ == "__main__":
    main()
