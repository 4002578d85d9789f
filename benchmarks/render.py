"""Copy figures from ``results/*.json`` into the Markdown files that show them.

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``; running this script
writes it anew, ``--check`` only compares and fails where a file and the results differ.
"""

from __future__ import annotations

import argparse
import re
import statistics
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


METHODS = {
    "ours": "L-C, default",
    "ours-distilled": "L-C, distilled",
    "gradual": "gradual magnitude pruning",
    "gradual-distilled": "gradual, distilled",
    "model-pruning": "Lightning's `ModelPruning`",
    "one-shot": "one-shot pruning",
    "reference": "reference package, tuned",
    "paper": '`preset="paper"`',
}
BUDGETS = {1: "S", 4: "4S"}
NONE = "–"
RULES = """
Every method ships its last θ. On seed 0's validation data were chosen, for each task: the learning
rate of every method; the ramp of gradual pruning and `ModelPruning`; the whole schedule of the
reference and `preset="paper"`. Bold: the best, and what is within one standard deviation, the
best's, of it, where every method has run; a number in brackets: of so many seeds only. The
reference cannot prune attention and LSTM.
"""
#: Tasks with weights that the reference cannot prune.
NOT_COVERED = ("digits-transformer", "shakespeare-lstm")


class Study:
    """The cells of the accuracy study, ready for tables.

    Attributes:
        scores: Test metric of every seed by (task, density, budget) and method.
        metrics: ``"acc"`` or ``"bpc"`` by task.
        methods: Those with any result, in the order of the tables.
        complete: Where every method has run: only there they are ranked.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        self.scores: dict[tuple[str, float, int], dict[str, list[float]]] = {}
        for c in results["cells"]:
            place = self.scores.setdefault((c["task"], c["density"], c["budget"]), {})
            place.setdefault(c["method"], []).append(c["test"])
        self.metrics = {d["task"]: d["metric"] for d in results["dense"]}
        self.methods = [m for m in METHODS if any(m in place for place in self.scores.values())]
        self.complete = [place for place in self.scores if self._complete(place)]

    def _complete(self, place: tuple[str, float, int]) -> bool:
        """Whether every method that can has run, with equally many seeds, three at least."""
        found = self.scores[place]
        able = [m for m in METHODS if m != "reference" or place[0] not in NOT_COVERED]
        seeds = {len(found.get(m, ())) for m in able}
        return len(seeds) == 1 and min(seeds) >= 3

    def leaders(self, place: tuple[str, float, int], methods: Sequence[str]) -> list[str]:
        """The best of some methods, then those within one sd, its own, of it."""
        found = {m: mean_sd(v) for m, v in self.scores[place].items() if m in methods}
        sign = -1 if self.metrics[place[0]] == "bpc" else 1
        order = sorted(found, key=lambda m: -sign * found[m][0])
        mean, sd = found[order[0]]
        return [m for m in order if sign * (mean - found[m][0]) <= sd]

    def table(self, task: str, budgets: Sequence[int]) -> str:
        """Methods down, densities and budgets across; the leaders bold."""
        columns = sorted(
            ((b, -d) for t, d, b in self.scores if t == task and b in budgets),
        )
        places = [(task, -d, b) for b, d in columns]
        header = ["density", *(_column(d, b, len(budgets) > 1) for _, d, b in places)]
        rows = [[METHODS[m], *(self._entry(place, m) for place in places)] for m in self.methods]
        return table(header, rows) + self._note(task, budgets)

    def _entry(self, place: tuple[str, float, int], method: str) -> str:
        found = self.scores[place].get(method)
        if found is None:
            return NONE
        most = max(map(len, self.scores[place].values()))
        text = spread(mean_sd(found), self._digits(place[0]))
        if len(found) == 1:
            text = f"{found[0]:.{self._digits(place[0])}f}"
        if len(found) < most:
            return f"{text} ({len(found)})"
        leads = place in self.complete and method in self.leaders(place, self.methods)
        return f"**{text}**" if leads else text

    def _note(self, task: str, budgets: Sequence[int]) -> str:
        cells = [c for c in self.results["cells"] if c["task"] == task and c["budget"] in budgets]
        steps = {BUDGETS[c["budget"]]: c["optimizer_steps"] for c in cells}
        lengths = ", ".join(f"{name} is {n:,} optimizer steps" for name, n in steps.items())
        records = [d for d in self.results["dense"] if d["task"] == task]
        networks = {d["weights"]: d["test"] for d in records if d["budget"] in budgets}
        dense = list(networks.values())
        seeds = len({d["seed"] for d in records})
        unit = "bits per character, less is better"
        if self.metrics[task] == "acc":
            unit = "accuracy in %"
        return (
            f"\nTest {unit}, mean ± sd of {seeds} seeds; dense "
            f"{spread(mean_sd(dense), self._digits(task))}; {lengths}.\n"
        )

    def _digits(self, task: str) -> int:
        return 3 if self.metrics[task] == "bpc" else 1

    def wins(self) -> str:
        """In how many complete cells each method leads, among all and among those taught alike."""
        alike = {m: [o for o in self.methods if _taught(o) == _taught(m)] for m in self.methods}
        rows = []
        for m in self.methods:
            places = [p for p in self.complete if m in self.scores[p]]
            row = [METHODS[m], str(len(places))]
            for rivals in (self.methods, alike[m]):
                leaders = [self.leaders(p, rivals) for p in places]
                row.append(str(sum(names[0] == m for names in leaders)))
                row.append(str(sum(m in names for names in leaders)))
            rows.append(row)
        header = ["", "cells", "best", "within 1 sd", "best, same teaching", "within 1 sd"]
        return table(header, rows)

    def source(self) -> str:
        """Where the figures come from, in a line."""
        used = [self.results["environments"][c["environment"]] for c in self.results["cells"]]
        torches = ", ".join(sorted({e["versions"]["torch"] for e in used}))
        cpus = ", ".join(sorted({e["cpu"] for e in used}))
        days = sorted({e["date"][:10] for e in used})
        return (
            f"\n`benchmarks/lc_quality.py`, torch {torches}, {cpus}, "
            f"{used[0]['torch_threads']} thread(s), {', '.join(days)}.\n"
        )


def _column(density: float, budget: int, with_budget: bool) -> str:
    return f"{density:.1%}" + (f", {BUDGETS[budget]}" if with_budget else "")


def _taught(method: str) -> bool:
    return method.endswith("-distilled")


def lc_quality() -> str | None:
    """Accuracy on the digits network, and in how many cells of the study each method leads."""
    results = read_results("lc_quality")
    if not results:
        return None
    study = Study(results)
    wins = (
        f"\nOver the {len(study.complete)} of {len(study.scores)} cells (task × density × budget) "
        f"so far in which every method has run:\n\n{study.wins()}"
    )
    return study.table("digits-cnn", [1]) + wins + study.source()


def lc_quality_tasks() -> str | None:
    """Accuracy on every task."""
    results = read_results("lc_quality")
    if not results:
        return None
    study = Study(results)
    tables = (f"### {task}\n\n{study.table(task, list(BUDGETS))}\n" for task in study.metrics)
    return (
        "".join(tables)
        + f"### Complete cells of all tasks\n\n{study.wins()}{RULES}{study.source()}"
    )


def lc_study() -> str | None:
    """Each setting against the defaults, by task: the mean difference of equal cells."""
    results = read_results("lc_study")
    if not results:
        return None
    metrics = {d["task"]: d["metric"] for d in results["dense"]}
    scores: dict[tuple[str, str], dict[tuple[float, int], float]] = {}
    for c in results["cells"]:
        scores.setdefault((c["task"], c["method"]), {})[c["density"], c["seed"]] = c["test"]
    tasks = list(dict.fromkeys(task for task, _ in scores))
    rows = []
    for variant in dict.fromkeys(c["method"] for c in results["cells"]):
        row = [variant]
        for task in tasks:
            base, own = scores.get((task, "default"), {}), scores.get((task, variant), {})
            unit = -100 if metrics[task] == "bpc" else 1
            gains = [unit * (own[cell] - base[cell]) for cell in own if cell in base]
            row.append(f"{spread(mean_sd(gains))} ({len(gains)})" if gains else NONE)
        rows.append(row)
    rows.sort(key=lambda row: (row[0] != "default", row[0]))
    note = (
        "\nMean ± sd, over densities and seeds (how many), of the difference to the default in "
        "points of test accuracy, or in hundredths of a bit per character; more is better.\n"
    )
    return table(["", *tasks], rows) + note


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


WAYS = {"lc": "L-C", "once": "rounded once", "straight-through": "straight-through"}


def quantizers() -> str | None:
    """Every quantizer in each way, a table for each task."""
    results = read_results("quantizers")
    if not results:
        return None
    scores: dict[str, dict[tuple[str, str], list[float]]] = {}
    for c in results["cells"]:
        name, way = c["method"].rsplit(", ", 1)
        scores.setdefault(c["task"], {}).setdefault((name, way), []).append(c["test"])
    parts = []
    for task, found in scores.items():
        rows = []
        for name in dict.fromkeys(name for name, _ in found):
            entries = (found.get((name, way)) for way in WAYS)
            rows.append(
                [name, *(spread(mean_sd(v)) + f" ({len(v)})" if v else NONE for v in entries)]
            )
        dense = mean_sd([d["test"] for d in results["dense"] if d["task"] == task])
        note = f"\nTest accuracy in %, mean ± sd (seeds); dense {spread(dense)}.\n\n"
        parts.append(f"### {task}\n\n" + table(["", *WAYS.values()], rows) + note)
    return "".join(parts).rstrip("\n") + source({"environment": results["environments"][-1]})


FIGURES: dict[str, Callable[[], str | None]] = {
    "demo": demo,
    "lc-quality": lc_quality,
    "lc-quality-tasks": lc_quality_tasks,
    "lc-study": lc_study,
    "paper": paper,
    "quantizers": quantizers,
    "lc-overhead": lc_overhead,
    "search-1d": search_1d,
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
