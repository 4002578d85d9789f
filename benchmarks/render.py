"""Copy figures from ``results/*.json`` into the Markdown files that show them.

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``; running this script
writes it anew, ``--check`` only compares and fails where a file and the results differ.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import mean_sd, read_results

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is aligned right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *rows])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``mean ± sd`` of such a pair."""
    mean, sd = values
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def source(results: dict[str, Any]) -> str:
    """Where the figures come from, in a line."""
    e = results["environment"]
    return (
        f"\n`{e['command']}`, torch {e['versions']['torch']}, {e['cpu']}, "
        f"{e['torch_threads']} thread(s), {e['date'][:10]}.\n"
    )


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


def lc_quality() -> str:
    """Test accuracy of every method at every density."""
    results = read_results("lc_quality_digits")
    labels = {
        "ours": "**L-C, default**",
        "paper": '`preset="paper"`',
        "reference": "reference package, tuned",
        "gradual": "gradual magnitude pruning",
        "gradual-distilled": "gradual, distilled",
    }
    densities = sorted(
        {c["density"] for m in results["methods"].values() for c in m["cells"]}, reverse=True
    )
    rows = []
    for method, label in labels.items():
        if method not in results["methods"]:
            continue
        cells = results["methods"][method]["cells"]
        row = [label]
        for density in densities:
            found = [100 * c["test_acc"] for c in cells if c["density"] == density]
            row.append(spread(mean_sd(found)) if found else "")
        rows.append(row)
    dense = mean_sd([100 * d["test_acc"] for d in results["dense"]])
    seeds = len(results["dense"])
    note = (
        f"\nTest accuracy in %, mean ± sd of {seeds} seeds, after "
        f"{results['task']['optimizer_steps']:,} optimizer steps of batch "
        f"{results['task']['batch_size']}; dense {spread(dense)}.\n"
    )
    return table(["density", *(f"{d:.1%}" for d in densities)], rows) + note + source(results)


def lc_overhead() -> str:
    """Step ratio and C-step seconds."""
    results = read_results("lc_overhead")
    steps = table(
        ["weights", *results["steps"]],
        [
            [
                name,
                *(
                    f"{row['plain_ms']:.0f} ms × {row['ratio_of_medians']:.3f}"
                    for row in (by_size[name] for by_size in results["steps"].values())
                ),
            ]
            for name in next(iter(results["steps"].values()))
        ],
    )
    c_steps = table(
        ["weights", "C-step", "`topk` threshold", "`kthvalue` threshold"],
        [
            [name, *(f"{row[way]:.3f} s" for way in ("condensa", "topk", "kthvalue"))]
            for name, row in results["c_steps"].items()
        ],
    )
    return f"{steps}\n{c_steps}{source(results)}"


def search_1d() -> str:
    """Regret of every method on the synthetic cliffs."""
    results = read_results("search_1d")
    rows = []
    for method in results["objectives"]["memory"]:
        row = [f"**{method}**" if method == "condensa" else method]
        for objective in ("memory", "throughput"):
            found = results["objectives"][objective][method]
            for after in ("after_5", "after_10"):
                cell = found[after]
                row.append(f"{cell['regret_mean']:.3f} ± {cell['regret_sd']:.3f}")
            row.append(f"{found['after_10']['infeasible_share']:.0%}")
        rows.append(row)
    header = ["method"]
    for objective in ("memory", "throughput"):
        header += [f"{objective} @5", "@10", "infeasible"]
    return table(header, rows) + f"\n{len(results['seeds'])} problems each." + source(results)


FIGURES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "lc-quality": lc_quality,
    "lc-overhead": lc_overhead,
    "search-1d": search_1d,
}


def render(text: str) -> str:
    """The text with every block's figures taken from the results."""
    return BLOCK.sub(lambda m: f"{m[1]}{FIGURES[m['name']]()}{m[3]}", text)


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
