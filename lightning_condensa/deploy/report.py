"""The per-layer table of what was compressed, how far, and why not."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_condensa.deploy.densities import PoolRow
from lightning_condensa.schemes import Encoding, Skipped


@dataclass(frozen=True)
class LayerRow:
    """One compressed parameter.

    Attributes:
        name: Parameter name.
        shape: Its shape.
        nnz: Non-zero values; those of all factors and terms where it is a sum or product.
        density: ``nnz`` for each element of the parameter.
        bits: Bits of one stored value; of the widest where factors and terms differ.
        value_bytes: Bytes of the surviving values and their scales (the paper's count).
        gap: ‖w − Δ(θ)‖ / ‖Δ(θ)‖ at the end of the L-C phase; NaN where there was none.
        note: What is the matter with it, if something is: next to nothing is left, or units
            could not be removed.
    """

    name: str
    shape: tuple[int, ...]
    nnz: int
    density: float
    bits: int
    value_bytes: float
    gap: float
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Per-layer figures of a compressed model; ``print`` shows a table.

    Attributes:
        rows: The compressed parameters.
        skipped: The other parameters, with the reason.
        pools: What was asked of pruned parameters, and what is left.
    """

    rows: tuple[LayerRow, ...]
    skipped: tuple[Skipped, ...]
    pools: tuple[PoolRow, ...] = ()

    @classmethod
    def of(
        cls,
        theta: Mapping[str, Encoding],
        skipped: Iterator[Skipped] | list[Skipped],
        gaps: Mapping[str, float],
        pools: tuple[PoolRow, ...] = (),
        held: Mapping[str, str] | None = None,
    ) -> Report:
        """Count from the tensors that ship."""
        collapsed = {c.name: f"{c.kept} of {c.total} left" for p in pools for c in p.collapsed}
        rows = tuple(
            LayerRow(
                name=name,
                shape=tuple(e.shape),
                nnz=e.nnz,
                density=e.density,
                bits=e.value_bits,
                value_bytes=e.storage_bits / 8,
                gap=gaps.get(name, math.nan),
                note="; ".join(filter(None, [collapsed.get(name), (held or {}).get(name)])),
            )
            for name, e in theta.items()
        )
        return cls(rows, tuple(skipped), pools)

    @property
    def density(self) -> float:
        """Non-zero values for each element, over all compressed parameters."""
        return sum(r.nnz for r in self.rows) / max(sum(math.prod(r.shape) for r in self.rows), 1)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Layers that are nearly removed, and densities that are far from what was asked."""
        return tuple(text for pool in self.pools for text in pool.warnings)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "rows": [asdict(r) for r in self.rows],
            "skipped": [asdict(s) for s in self.skipped],
            "pools": [asdict(p) for p in self.pools],
            "warnings": list(self.warnings),
        }

    def table(self) -> Table:
        """The report as a Rich table."""
        asked = [
            f"{p.scheme}: {p.asked:.2%} asked, {p.kept:,} of {p.total:,} kept ({p.density:.2%})"
            for p in self.pools
        ]
        table = Table(
            title="Compressed parameters",
            title_justify="left",
            caption="\n".join([*asked, *self.warnings]) or None,
            caption_justify="left",
        )
        table.add_column("parameter")
        for column in ("shape", "non-zero", "density", "bits", "bytes", "gap"):
            table.add_column(column, justify="right")
        table.add_column("why not")
        for row in self.rows:
            table.add_row(
                row.name,
                "×".join(map(str, row.shape)),
                f"{row.nnz:,}",
                f"{row.density:.2%}",
                str(row.bits),
                f"{row.value_bytes:,.0f}",
                "" if math.isnan(row.gap) else f"{row.gap:.3f}",
                row.note,
            )
        for skip in self.skipped:
            table.add_row(skip.name, *[""] * 6, skip.reason, style="dim")
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()
