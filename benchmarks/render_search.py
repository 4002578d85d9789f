"""Tables of searches in several dimensions."""

from __future__ import annotations

from typing import Any

from common import read_results
from tables import NONE, source, table

ORDER = (
    "condensa",
    "condensa, scan",
    "condensa, meaningless scan",
    "condensa, bi-log GP",
    "best single strength",
    "optuna GP",
    "optuna TPE",
    "SCBO",
    "qLogEI, constrained",
)


def search_nd() -> str | None:
    """Regret of every method in each kind of problem, and the time of a proposal."""
    results = read_results("search_nd")
    if not results:
        return None
    rows = sorted(
        results["rows"], key=lambda r: (r["bits"], r["groups"] != 8, r["groups"], _place(r))
    )
    cells = [
        [
            f"{r['groups']}{' + bits' if r['bits'] else ''}",
            f"**{r['method']}**" if r["method"].startswith("condensa") else r["method"],
            str(r["problems"]),
            *(_regret(r, f"after_{budget}") for budget in (10, 20, 40)),
            f"{r['infeasible_share']:.0%}",
            NONE
            if r["method"] == "best single strength"
            else f"{r['cpu_seconds_per_trial']:.2f} s",
        ]
        for r in rows
    ]
    header = ["groups", "method", "problems", "@10", "@20", "@40", "infeasible", "a proposal"]
    times = "; ".join(f"{name}: {value:.1f} s" for name, value in results["proposal"].items())
    note = f"\nOne proposal with a scan in 12 groups, CPU seconds on one core: {times}.\n"
    return table(header, cells) + note + source(results)


def _place(row: dict[str, Any]) -> int:
    return ORDER.index(row["method"])


def _regret(row: dict[str, Any], key: str) -> str:
    return f"{row[key]['mean']:.3f} ± {row[key]['sd']:.3f}" if key in row else NONE
