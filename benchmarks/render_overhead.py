"""Tables of what L-C costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from common import read_results
from tables import NONE, source, table

OVERHEAD_FILES = ("lc_overhead", "lc_overhead_cuda_fp32", "lc_overhead_cuda_bf16")
C_STEPS = {
    "condensa": "C-step",
    "metric": "times a metric",
    "floors": "with floors",
    "topk": "`topk`",
    "kthvalue": "`kthvalue`",
}
STEPS_NOTE = """\
Times a plain step, median (range) of rounds. *Masked*: most steps, which zero the gradients of
pruned weights; *window*: the 8 before a C-step, which also sum squared gradients; then a whole run
of the default schedule with its C-steps, and the reference's L-step beside a plain loop.
"""
C_STEPS_NOTE = """\
Median seconds, and peak memory per weight, results included: masks and θ of ours, only a threshold
of `topk` and `kthvalue`. *Times a metric*: as in training; *with floors*: layers fall below
`min_per_layer`; time grows with the number of weights to the power of the last row.
"""


def lc_overhead() -> str | None:
    """Step ratios, ours and the reference's, and C-steps in time and memory, of each device."""
    found = [results for name in OVERHEAD_FILES if (results := read_results(name))]
    return "\n".join(map(_overhead, found)) if found else None


def projections() -> str | None:
    """The time of every projection, beside that of the passes that it must make."""
    results = read_results("projections")
    if not results:
        return None
    held = results["held"]
    new = [
        {r["case"]: r for r in results.get(pages, {}).get("rows", [])}
        for pages in ("huge", "small")
    ]
    rows = [
        [
            r["case"],
            f"{r['median_s']:.2f} s",
            str(r["passes"] or NONE),
            r["why"],
            _copies_a_pass(r),
            *(_copies_a_pass(n[r["case"]]) if r["case"] in n else NONE for n in new),
        ]
        for r in held["rows"]
    ]
    copies = [r["copy_s"] for r in held["rows"]]
    size = held["rows"][0]["weights"]
    note = f"\nA copy of {size:,} weights took {min(copies):.3f} to {max(copies):.3f} s.\n"
    header = ["", "time", "passes", "for", "copies a pass", "new huge pages", "new small pages"]
    return table(header, rows) + note + source(held)


def _copies_a_pass(row: dict[str, Any]) -> str:
    if not row["passes"]:
        return NONE
    times = [s / row["copy_s"] / row["passes"] for s in row["seconds"]["projection"]]
    return f"{statistics.median(times):.1f} ({min(times):.1f}–{max(times):.1f})"


def _overhead(results: dict[str, Any]) -> str:
    """The two tables of one device."""
    parts = []
    if "steps" in results:
        sources = [_overhead_source(results[p]) for p in ("steps", "reference") if p in results]
        parts += [_overhead_steps(results), STEPS_NOTE + "".join(sources)]
    if "c_steps" in results:
        part = results["c_steps"]
        parts += [_overhead_c_steps(part), C_STEPS_NOTE + _overhead_source(part)]
    return "\n".join(parts)


def _overhead_steps(results: dict[str, Any]) -> str:
    """A plain step, and how many times longer other steps take."""
    reference = {r["case"]: r for r in results.get("reference", {"rows": []})["rows"]}
    rows = []
    for r in results["steps"]["rows"]:
        rows.append(
            [
                r["network"],
                r["label"],
                r["optimizer"],
                f"{r['plain_ms']:.1f} ms",
                *(_times(r["ratios"][kind]) for kind in ("masked", "window", "run")),
                f"{r['c_step_ms']:.0f} ms",
                _times(reference[r["case"]]["ratios"]) if r["case"] in reference else NONE,
            ]
        )
    whole = f"{results['steps']['run_steps']:,}-step run"
    kinds = ["masked", "window", whole, "C-step", "reference's step"]
    return table(["network", "weights", "optimizer", "plain step", *kinds], rows)


def _overhead_c_steps(part: dict[str, Any]) -> str:
    """Seconds, and peak extra bytes per weight; then the exponents of growth in the weights."""
    rows = []
    for r in part["rows"]:
        ways = [r["ways"][way] for way in C_STEPS]
        cells = (f"{w['median_s']:.3f} s, {w['peak_bytes'] / r['weights']:.0f} B" for w in ways)
        rows.append([r["label"], *cells])
    exponents = (", ".join(f"{e:.2f}" for e in part["growth"][way]) for way in C_STEPS)
    return table(["weights", *C_STEPS.values()], [*rows, ["growth, exponent", *exponents]])


def _overhead_source(part: dict[str, Any]) -> str:
    """Where the figures come from, on which processor."""
    e = part["environment"]
    return source({"environment": e | {"cpu": e["cuda"]} if e["cuda"] else e})


def _times(ratios: Sequence[float]) -> str:
    """A median, and from where to where the rounds went, if there were several."""
    if len(ratios) == 1:
        return f"{ratios[0]:.3f}"
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f}–{max(ratios):.2f})"
