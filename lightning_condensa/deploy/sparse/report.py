"""What each layer of a sparse model uses, as a table and as data."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_condensa.deploy.sparse.choice import SparseRow


@dataclass(frozen=True)
class SparseReport:
    """How every Conv2d and Linear layer of a model is computed.

    Attributes:
        rows: One per layer.
        threads: CPU threads that were measured with; ``None`` on a CUDA device.
    """

    rows: tuple[SparseRow, ...]
    threads: int | None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def table(self) -> Table:
        """The report as a Rich table."""
        where = "CUDA" if self.threads is None else f"{self.threads} thread(s)"
        table = Table(title=f"Sparse execution, {where}", title_justify="left")
        table.add_column("layer")
        for column in ("input", "density", "dense", "sparse"):
            table.add_column(column, justify="right")
        table.add_column("method")
        table.add_column("times faster", justify="right")
        table.add_column("why not")
        for row in self.rows:
            sparse = row.seconds.get(row.method) if row.method != "dense" else None
            table.add_row(
                row.name,
                "×".join(map(str, row.inputs)),
                f"{row.density:.2%}",
                _microseconds(row.seconds.get("dense")),
                _microseconds(sparse),
                row.method,
                f"{row.speedup.median:.2f}" if row.speedup and row.method != "dense" else "",
                row.reason,
            )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:,.0f} µs"
