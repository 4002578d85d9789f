"""Tables of searches over real training runs, and of searches that were killed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import mean_sd, read_results
from search_real import steps_to_reach
from tables import NONE, cells_source, source, spread, table


def search_real() -> str | None:
    """What every method found, and for how many optimizer steps."""
    results = read_results("search_real")
    if not results:
        return None
    rows = results["rows"]
    cells = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in rows):
        group = [r for r in rows if (r["task"], r["method"]) == (task, method)]
        ratios = [
            r["dense"]["objective"] / r["trials"][-1]["best_objective"]
            for r in group
            if r["trials"][-1]["best_objective"] is not None
        ]
        changes = [
            r["trials"][-1]["test"] - r["dense"]["test"]
            for r in group
            if r["trials"][-1]["test"] is not None
        ]
        steps = [float(r["trials"][-1]["steps_so_far"]) for r in group]
        cells.append(
            [
                task,
                f"**{method}**" if method == "condensa" else method,
                str(len(group)),
                f"{_spread(ratios, 2)} ×" if ratios else NONE,
                _spread(changes, 2),
                _spread(steps, 0),
                _matches(rows, group),
            ]
        )
    header = ["task", "method", "seeds", "smaller or faster", "test", "steps"]
    return table([*header, "steps to the paper's result"], cells) + cells_source(
        "search_real", {"environments": [r["environment"] for r in rows], "cells": _numbered(rows)}
    )


def search_faults() -> str | None:
    """What is left of a search whose processes were killed."""
    results = read_results("search_faults")
    if not results:
        return None
    cells = [
        [
            r["storage"],
            str(r["trials"]),
            f"{r['kills of the driver']} + {r['kills of a worker']}",
            f"{r['finished, present once']} of {r['finished']}",
            str(r["same as undisturbed"]),
            "the same" if r["same best"] else "**another**",
            f"{r['seconds'][0]} s, {r['seconds'][1]} s",
        ]
        for r in results["rows"]
    ]
    header = ["storage", "trials", "kills, driver + worker", "finished, present once"]
    header += ["as undisturbed", "best", "undisturbed, killed"]
    return table(header, cells) + source(results)


def _matches(rows: list[dict[str, Any]], group: list[dict[str, Any]]) -> str:
    """Share of the paper's steps after which its final objective was reached, over seeds."""
    shares, compared = list[float](), 0
    for row in group:
        key = (row["task"], "paper", row["seed"])
        paper = next((r for r in rows if (r["task"], r["method"], r["seed"]) == key), None)
        wanted = None if paper is None else paper["trials"][-1]["best_objective"]
        if paper is None or wanted is None:
            continue
        compared += 1
        if (steps := steps_to_reach(row, wanted)) is not None:
            shares.append(100 * steps / paper["trials"][-1]["steps_so_far"])
    if not compared:
        return NONE
    missing = compared - len(shares)
    found = f"{_spread(shares, 0)} %" if shares else "not"
    return f"{found} (in {len(shares)} of {compared})" if missing and shares else found


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return NONE
    return spread(mean_sd(list(values)), digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def _numbered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"environment": i} for i, _ in enumerate(rows)]
