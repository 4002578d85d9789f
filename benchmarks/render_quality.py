"""Tables of the accuracy study, and of the study behind the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import mean_sd, read_results
from tables import NONE, cells_source, spread, table

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
RULES = """
Every method ships its last θ. On seed 0's validation data were chosen, for each task: the learning
rate of every method; the ramp of gradual pruning and `ModelPruning`; the whole schedule of the
reference and `preset="paper"`. Bold: the best, and what is within one standard deviation, the
best's, of it, where every method has run; a number in brackets: of so many seeds only; without a
deviation: of seed 0 only. The reference cannot prune attention and LSTM.
"""
#: Tasks with weights that the reference cannot prune.
NOT_COVERED = ("digits-transformer", "shakespeare-lstm")


class Study:
    """The cells of the accuracy study, ready for tables.

    Attributes:
        scores: Test metrics by (task, density, budget) and method: of the seeds that all methods
            have, where these are three at least, else of each one's own.
        seeds: Those that are shown, by task.
        metrics: ``"acc"`` or ``"bpc"`` by task.
        methods: Those with any result, in the order of the tables.
        complete: Where every method has run: only there they are ranked.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        found: dict[tuple[str, float, int], dict[str, dict[int, float]]] = {}
        for c in results["cells"]:
            place = found.setdefault((c["task"], c["density"], c["budget"]), {})
            place.setdefault(c["method"], {})[c["seed"]] = c["test"]
        self.scores = {place: _on_equal_seeds(by_method) for place, by_method in found.items()}
        self.seeds = {
            task: set().union(*(_seeds_shown(m) for p, m in found.items() if p[0] == task))
            for task, _, _ in found
        }
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
        records = [d for d in records if d["seed"] in self.seeds[task]]
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
        return cells_source("lc_quality", self.results)


def _on_equal_seeds(found: dict[str, dict[int, float]]) -> dict[str, list[float]]:
    """Where a method has more seeds than others, those that all have: some seeds are harder."""
    shown = _seeds_shown(found)
    return {m: [test for seed, test in own.items() if seed in shown] for m, own in found.items()}


def _seeds_shown(found: dict[str, dict[int, float]]) -> set[int]:
    """Seeds that all methods have, where these are three at least, else all there are."""
    common = set[int].intersection(*(set(own) for own in found.values()))
    return common if len(common) >= 3 else set[int]().union(*found.values())


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
