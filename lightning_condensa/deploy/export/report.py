"""What became of each compressed parameter in an exported file."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class OnnxLayer:
    """One compressed parameter in an ONNX file.

    Attributes:
        name: Parameter name.
        stored: ``"int8"``: as its codes, and computed with in integers; ``"codebook"``: as a table
            and indices; ``"float32"``, ``"float16"``: as numbers.
        reason: Why it is not stored as int8 where that was asked for.
    """

    name: str
    stored: str
    reason: str = ""


@dataclass(frozen=True)
class OnnxReport:
    """An exported ONNX file; ``print`` shows a table.

    Attributes:
        bytes: Its size.
        layers: The compressed parameters.
    """

    bytes: int
    layers: tuple[OnnxLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def table(self) -> Table:
        """The report as a Rich table."""
        table = Table(title=f"ONNX file, {self.bytes:,} bytes", title_justify="left")
        for column in ("parameter", "stored as", "why not int8"):
            table.add_column(column)
        for layer in self.layers:
            table.add_row(layer.name, layer.stored, layer.reason)
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()
