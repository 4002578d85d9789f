"""Tables of searches on synthetic networks."""

from __future__ import annotations

from typing import Any

from common import read_results
from tables import NONE, cells_source, source, spread, table

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
    "Ax",
)


#: Share of infeasible winners after ten trials that is taken for equal risk.
RISK = 0.05
OBJECTIVES = ("memory", "throughput")


def search_1d() -> str | None:
    """Regret of every method along one density, with the margins of the default."""
    results = read_results("search_1d")
    if not results:
        return None
    rows = results["rows"]
    cells = []
    for method, z in dict.fromkeys((r["method"], r["z"]) for r in rows):
        if z and method != "condensa":
            continue
        cell = [f"**{method}**" if method == "condensa" else method, f"{z:g}"]
        for objective in OBJECTIVES:
            row = _row(rows, objective, method, z)
            cell += [_mean(row, f"after_{budget}") for budget in (3, 5, 10)]
            cell.append(NONE if row is None else f"{row['after_10']['infeasible_share']:.0%}")
        cells.append(cell)
    header = ["method", "z"]
    for objective in OBJECTIVES:
        header += [f"{objective} @3", "@5", "@10", "infeasible"]
    return table(header, cells) + _problems(rows) + cells_source("search_1d", results, "rows")


def search_1d_risk() -> str | None:
    """The same where each method has the least margin that keeps its winners feasible."""
    results = read_results("search_1d")
    if not results:
        return None
    rows = results["rows"]
    cells = []
    for method in dict.fromkeys(r["method"] for r in rows):
        cell = [f"**{method}**" if method == "condensa" else method]
        for objective in OBJECTIVES:
            safe = [
                r
                for r in rows
                if (r["method"], r["objective"]) == (method, objective)
                and r["after_10"]["infeasible_share"] <= RISK
            ]
            row = min(safe, key=lambda r: r["z"], default=None)
            cell.append(NONE if row is None else f"{row['z']:g}")
            cell += [_mean(row, key) for key in ("after_5", "after_10")]
            unseen = None if row is None else row["after_10"]["unseen_family"]
            cell.append(NONE if unseen is None else f"{unseen['regret_mean']:.3f}")
        cells.append(cell)
    header = ["method"]
    for objective in OBJECTIVES:
        header += [f"{objective}: z", "@5", "@10", "@10, unseen family"]
    return table(header, cells) + _problems(rows) + cells_source("search_1d", results, "rows")


def search_fidelity() -> str | None:
    """Regret by trainings spent, with and without trials that take a share of one."""
    results = read_results("search_fidelity")
    if not results:
        return None
    rows = results["rows"]
    budgets = [int(key.removeprefix("after_")) for key in rows[0] if key.startswith("after_")]
    ordered = sorted(rows, key=lambda r: (r["objective"], r["z"], -r["fidelity"]))
    cells = [
        [
            r["objective"],
            f"{r['fidelity']:g}",
            f"{r['trials']:.1f}",
            *(_mean(r[f"after_{budget}"], "usual") for budget in budgets),
            *(f"{r[f'after_{b}']['misleading']['regret_mean']:.3f}" for b in budgets),
            f"{r[f'after_{budgets[-1]}']['infeasible_share']:.0%}",
        ]
        for r in ordered
    ]
    header = ["objective", "share", "trials"]
    header += [f"@{budget}" for budget in budgets]
    header += [f"misleading @{budget}" for budget in budgets]
    return table([*header, "infeasible"], cells) + _problems(rows) + source(results)


def _row(
    rows: list[dict[str, Any]], objective: str, method: str, z: float
) -> dict[str, Any] | None:
    wanted = (objective, method, z)
    return next((r for r in rows if (r["objective"], r["method"], r["z"]) == wanted), None)


def _mean(row: dict[str, Any] | None, key: str) -> str:
    return NONE if row is None else f"{row[key]['regret_mean']:.3f} ± {row[key]['regret_sd']:.3f}"


def _problems(rows: list[dict[str, Any]]) -> str:
    return (
        f"\n{' or '.join(str(n) for n in sorted({r['problems'] for r in rows}))} problems each.\n"
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
    return table(header, cells) + note + cells_source("search_nd", results, "rows")


def search_scaling() -> str | None:
    """Time of a search on several workers, and what trials in flight cost in quality."""
    results = read_results("search_scaling")
    if not results:
        return None
    rows = results["rows"]
    cells = [
        [
            str(r["workers"]),
            f"{r['fit']:.0f} s",
            f"{r['trials'] * r['seconds a trial'] / r['workers']:.0f} s",
            f"{r['efficiency']:.0%}",
            f"{r['against the first row']:.0%}",
            f"{r['beyond the sleep, median']:.1f} s",
            f"{r['load']:.1f}",
        ]
        for r in rows
    ]
    ideal = ["`fit`", "sleep alone", "sleep alone / `fit`", "against one worker"]
    header = ["workers", *ideal, "a trial beyond its sleep", "load"]
    regrets = [
        [
            r["objective"],
            str(r["at a time"]),
            str(r["problems"]),
            spread(r["regret"], 3),
            f"{r['infeasible']:.0%}",
        ]
        for r in results["parallel"]
    ]
    regret = ["objective", "at a time", "problems", f"@{results['parallel'][0]['trials']}"]
    quality = table([*regret, "infeasible"], regrets)
    note = (
        f"\n{rows[0]['trials']} trials that sleep for {rows[0]['seconds a trial']:.0f} s each.\n\n"
    )
    return table(header, cells) + note + quality + source(results)


def search_hosts() -> str | None:
    """Which host ran what, when one of them died."""
    results = read_results("search_hosts")
    if not results:
        return None
    found = results["dask"]
    cells = []
    for host in found["hosts"]:
        began = sum(t["began on"].count(host) for t in found["trials"])
        ended = sum(t["ended on"].count(host) for t in found["trials"])
        killed = found["killed"]["in"] if host == found["killed"]["host"] else NONE
        cells.append([host, str(began), str(ended), killed])
    twice = ", ".join(found["begun twice"]) or "none"
    note = (
        f"\nOf {found['asked for']} trials {found['finished']} finished, "
        f"{found['ended once']} of them ended once, and {found['in the study']} are in the study; "
        f"begun twice: {twice}.\n"
    )
    return table(["host", "trials begun", "ended", "killed in"], cells) + note + source(results)


def _place(row: dict[str, Any]) -> int:
    return ORDER.index(row["method"])


def _regret(row: dict[str, Any], key: str) -> str:
    return f"{row[key]['mean']:.3f} ± {row[key]['sd']:.3f}" if key in row else NONE
