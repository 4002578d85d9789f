"""Tables of what schemes other than pruning by elements cost in accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from common import mean_sd, read_results
from tables import NONE, cells_source, source, spread, table

#: The toolkit's changes of test error on all of MNIST, in points, from a dense error of 2.13 %.
PUBLISHED = {
    "5 % of the weights": 0.05,
    "codebook of 2": 0.43,
    "codebook of 2 + 1 %": 0.04,
    "low rank, 10 %": -0.23,
}
#: Other files of the same weights.
OTHERS = {
    "safetensors_zstd": "safetensors + zstd",
    "safetensors": "safetensors",
    "torch_save": "`torch.save`",
}
WAYS = {
    "lc": "L-C",
    "once": "rounded once",
    "straight-through": "straight-through",
}


def quantizers() -> str | None:
    """Every quantizer in each way, a table for each task."""
    results = read_results("quantizers")
    if not results:
        return None
    scores: dict[tuple[str, int], dict[str, dict[str, dict[int, float]]]] = {}
    for c in results["cells"]:
        scheme, way = c["method"].rsplit(", ", 1)
        row = scores.setdefault((c["task"], c["budget"]), {}).setdefault(scheme, {})
        row.setdefault(way, {})[c["seed"]] = c["test"]
    parts = []
    for (task, budget), found in sorted(scores.items()):
        ways = [way for way in WAYS if any(way in row for row in found.values())]
        dense = {
            d["seed"]: d["test"]
            for d in results["dense"]
            if (d["task"], d["budget"]) == (task, budget)
        }
        rows = [
            [scheme, *_on_common_seeds(row, ways), _lost(row.get("lc", {}), dense)]
            for scheme, row in found.items()
        ]
        scale = spread(mean_sd(list(dense.values())))
        note = f"\nTest accuracy in %, mean ± sd (seeds); dense {scale}.\n\n"
        steps = "" if budget == 1 else f", {budget} times the steps"
        header = ["", *(WAYS[way] for way in ways), "lost"]
        parts.append(f"### {task}{steps}\n\n" + table(header, rows) + note)
    return "".join(parts).rstrip("\n") + "\n" + cells_source("quantizers", results)


def _on_common_seeds(row: dict[str, dict[int, float]], ways: Sequence[str]) -> list[str]:
    """Mean ± sd of each way over the seeds that all in a row have: some seeds are harder."""
    common = sorted(set[int].intersection(*(set(own) for own in row.values())))
    entries = ([row[way][seed] for seed in common] if way in row else [] for way in ways)
    return [spread(mean_sd(v)) + f" ({len(v)})" if v else NONE for v in entries]


def _lost(scores: dict[int, float], dense: dict[int, float]) -> str:
    """What is lost against dense, seed by seed."""
    lost = sorted(dense[seed] - score for seed, score in scores.items())
    if not lost:
        return NONE
    return f"{statistics.fmean(lost):.1f} ({lost[0]:.1f} – {lost[-1]:.1f})"


def structured() -> str | None:
    """Accuracy, parameters and FLOPs after the removal of filters, a table for each task."""
    results = read_results("structured")
    if not results:
        return None
    parts = []
    for task in dict.fromkeys(c["task"] for c in results["cells"]):
        cells = [c for c in results["cells"] if c["task"] == task]
        densities = sorted({c["density"] for c in cells}, reverse=True)
        rows = []
        for way in dict.fromkeys(c["method"] for c in cells):
            row = [way]
            for density in densities:
                here = [c for c in cells if c["density"] == density]
                row += _structured_entries([c for c in here if c["method"] == way], _common(here))
            rows.append(row)
        header = [""]
        for density in densities:
            header += [f"{density:.0%} of filters", "parameters", "FLOPs"]
        dense = mean_sd([d["test"] for d in results["dense"] if d["task"] == task])
        note = f"\nTest accuracy in %, mean ± sd (seeds); dense {spread(dense)}.\n\n"
        parts.append(f"### {task}\n\n" + table(header, rows) + note)
    return "".join(parts).rstrip("\n") + "\n" + cells_source("structured", results)


def _common(cells: Sequence[dict[str, Any]]) -> set[int]:
    """Seeds that all methods of some cells have."""
    seeds: dict[str, set[int]] = {}
    for c in cells:
        seeds.setdefault(c["method"], set()).add(c["seed"])
    return set[int].intersection(*seeds.values())


def _structured_entries(found: Sequence[dict[str, Any]], seeds: set[int]) -> list[str]:
    cells = [c for c in found if c["seed"] in seeds]
    if not cells:
        return [NONE] * 3
    shares = (statistics.fmean(c[what] for c in cells) for what in ("parameters", "flops"))
    scores = mean_sd([c["test"] for c in cells])
    return [f"{spread(scores)} ({len(cells)})", *(f"{share:.1%}" for share in shares)]


def lenet300() -> str | None:
    """Test error of each scheme on LeNet300, and how far it is from dense, split by split."""
    return _against_dense("lenet300", "error")


def char_lstm() -> str | None:
    """Bits per character of each scheme on the LSTM, and how far they are from dense."""
    return _against_dense("shakespeare-lstm", "bits per character")


def _against_dense(task: str, what: str) -> str | None:
    results = read_results("schemes")
    cells = [c for c in results.get("cells", []) if c["task"] == task]
    if not cells:
        return None
    sign, offset = (-1, 100) if what == "error" else (1, 0)
    places = 2 if what == "error" else 3
    dense = {d["seed"]: offset + sign * d["test"] for d in results["dense"] if d["task"] == task}
    rows = [["dense", spread(mean_sd(list(dense.values())), places), "", ""]]
    for name in dict.fromkeys(c["method"] for c in cells):
        own = {c["seed"]: offset + sign * c["test"] for c in cells if c["method"] == name}
        changes = [value - dense[seed] for seed, value in own.items()]
        stored = [
            c["weight_bytes"] / c["storage_bytes"]
            for c in cells
            if c["method"] == name and "storage_bytes" in c
        ]
        rows.append(
            [
                name,
                spread(mean_sd(list(own.values())), places),
                f"{statistics.fmean(changes):+.{places}f} ± {mean_sd(changes)[1]:.{places}f}",
                f"{statistics.fmean(stored):.1f} ×" if stored else "",
            ]
        )
        if what == "error":
            rows[-1].append(f"{PUBLISHED[name]:+.2f}" if name in PUBLISHED else "")
    header = ["", what, "change", "smaller weights"]
    if what == "error":
        rows[0].append("")
        header.append("toolkit, all of MNIST")
    note = (
        f"\nOn test data, mean ± sd of {len(dense)} seeds; {cells[0]['optimizer_steps']:,} steps.\n"
    )
    return table(header, rows) + note + cells_source("schemes", results)


def contract() -> str | None:
    """Cases and time of the tests of schemes."""
    results = read_results("contract")
    if not results:
        return None
    rows = [
        [s["suite"], f"`{s['path']}`", str(s["cases"]), f"{s['seconds']:.0f} s"]
        for s in results["suites"]
    ]
    note = (
        f"\n{results['laws']} laws; {results['layers']} layers and {results['networks']} whole "
        "network(s) to check a scheme on. One thread.\n"
    )
    return table(["tests", "in", "cases", "time"], rows) + note + source(results)


def packed() -> str | None:
    """Bytes over the bound for every model, kind of values and density; load times."""
    results = read_results("packed")
    if not results:
        return None
    rows_of = results["sizes"]
    densities = sorted({r["density"] for r in rows_of})
    found = {(r["model"], r["values"], r["density"]): r for r in rows_of}
    rows = []
    for model, values in dict.fromkeys((r["model"], r["values"]) for r in rows_of):
        cells = [found[model, values, density] for density in densities]
        rows.append([f"{model}, {values}", *(f"{c['file'] / c['bound']:.3f}" for c in cells)])
    for other, title in OTHERS.items():
        shares = [[r[other] / r["file"] for r in rows_of if r["density"] == d] for d in densities]
        rows.append([f"{title}, over ours", *(f"{statistics.median(s):.2f}" for s in shares)])
    loads = ", ".join(
        f"{r['values']} at {r['density']:.0%} {r['median']:.2f}" for r in results["loads"]
    )
    note = (
        "\nLast rows: medians over models and values. Loading 20 M weights takes so many times as "
        f"long as from dense safetensors, medians: {loads}.\n"
    )
    header = ["file over bound, density", *(f"{d:.1%}" for d in densities)]
    sources = (source({"environment": results["environments"][p]}) for p in ("sizes", "loads"))
    return table(header, rows) + note + "".join(dict.fromkeys(sources))


def mutations() -> str | None:
    """What each line of a projection that was broken on purpose was noticed by."""
    results = read_results("mutations")
    if not results:
        return None
    rows = [
        [m["mutation"], f"`{m['file']}`", f"`{m['noticed_by']}`" if m["noticed_by"] else "nothing"]
        for m in results["mutations"]
    ]
    return table(["broken", "in", "noticed by"], rows).replace("---:", "---") + source(results)
