"""Markdown tables, and where their figures come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NONE = "–"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is aligned right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *rows])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``mean ± sd`` of such a pair."""
    mean, sd = values
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def cpu(environment: dict[str, Any]) -> str:
    """The processor, and its vector instructions where they were written down."""
    vectors = f" ({environment['vectors']})" if "vectors" in environment else ""
    return f"{environment['cpu']}{vectors}"


def source(results: dict[str, Any]) -> str:
    """Where the figures come from, in a line."""
    e = results["environment"]
    return (
        f"\n`{e['command']}`, torch {e['versions']['torch']}, {cpu(e)}, "
        f"{e['torch_threads']} thread(s), {e['date'][:10]}.\n"
    )


def cells_source(script: str, results: dict[str, Any], key: str = "cells") -> str:
    """Where the cells of a study come from, in a line."""
    used = [results["environments"][c["environment"]] for c in results[key]]
    torches = ", ".join(sorted({e["versions"]["torch"] for e in used}))
    cpus = ", ".join(sorted({cpu(e) for e in used}))
    days = ", ".join(sorted({e["date"][:10] for e in used}))
    threads = used[0]["torch_threads"]
    return f"\n`benchmarks/{script}.py`, torch {torches}, {cpus}, {threads} thread(s), {days}.\n"
