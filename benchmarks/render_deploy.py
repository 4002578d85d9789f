"""Tables of what compressed models cost when they run."""

from __future__ import annotations

from typing import Any

from common import read_results
from tables import NONE, source, table

ENGINES = {
    "eager": "eager, dense",
    "compile": "`torch.compile`, dense",
    "onnxruntime": "ONNX Runtime, dense",
    **{f"csr {d}": f"CSR, {d:.0%}" for d in (0.05, 0.02, 0.01)},
    **{f"sparse {d}": f"**sparse, {d:.0%}**" for d in (0.05, 0.02, 0.01)},
}


def sparse_execution() -> str | None:
    """Milliseconds of every engine, and how many times faster than ONNX Runtime it is."""
    results = read_results("sparse_execution")
    if not results:
        return None
    networks = list(dict.fromkeys(r["network"] for r in results["summary"]))
    note = (
        f"\nMilliseconds, median of {_repeats(results)} repeats, and times faster than ONNX "
        "Runtime (median, and range of repeats), in rounds in which every engine runs once.\n"
    )
    return "\n".join(_network(results, n) for n in networks) + note + source(results)


def _network(results: dict[str, Any], network: str) -> str:
    rows = [r for r in results["summary"] if r["network"] == network]
    found = {(r["engine"], r["batch"], r["threads"]): r for r in rows}
    settings = list(dict.fromkeys((r["batch"], r["threads"]) for r in rows))
    header = [network, *(f"batch {b}, {t} thread{'s' * (t > 1)}" for b, t in settings)]
    lines = [
        [label, *(_cell(found.get((engine, *setting))) for setting in settings)]
        for engine, label in ENGINES.items()
        if any((engine, *setting) in found for setting in settings)
    ]
    return table(header, lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return NONE
    low, high = row["times_range"]
    return f"{row['ms']:.2f} ms, {row['times']:.2f} × ({low:.1f}–{high:.1f})"


def _repeats(results: dict[str, Any]) -> int:
    return len({r["seed"] for r in results["runs"]})
