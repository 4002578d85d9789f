"""What each layer of a model costs: weights, operations, bytes, time."""

from __future__ import annotations

import io
import time
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_condensa.deploy.compressed import CompressedModel
from lightning_condensa.deploy.flops import FlopCount, count_flops
from lightning_condensa.deploy.sparse import SparseModel
from lightning_condensa.deploy.threads import check_threads, torch_threads
from lightning_condensa.deploy.timing import Timing, compare, finish
from lightning_condensa.schemes import Encoding

_LEAST_RUNS = 5


@dataclass(frozen=True)
class ProfileRow:
    """What one module costs, its children not counted.

    Attributes:
        name: Of the module; empty for the model itself.
        kind: Its class.
        parameters: Count of parameters.
        nonzeros: Those that are not zero.
        bytes: Of parameters and buffers; of θ where it is compressed.
        flops: Operations of one forward pass.
        effective_flops: Those that touch a non-zero weight.
        latency: Seconds of one forward pass.
    """

    name: str
    kind: str
    parameters: int
    nonzeros: int
    bytes: float
    flops: int
    effective_flops: float
    latency: Timing


@dataclass(frozen=True)
class Profile:
    """What a model costs.

    Attributes:
        rows: One per module that was called or holds tensors.
        total: Of the model, timed without looking inside.
        threads: CPU threads.
        device: Where it ran.
    """

    rows: tuple[ProfileRow, ...]
    total: ProfileRow
    threads: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain data."""
        return asdict(self)

    def table(self) -> Table:
        """The profile as a Rich table."""
        title = f"{self.total.kind}, {self.device}, {self.threads} thread(s)"
        table = Table(title=title, title_justify="left")
        table.add_column("module")
        table.add_column("kind")
        columns = ("parameters", "non-zero", "bytes", "MFLOPs", "effective", "µs", "± IQR")
        for column in columns:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*_cells(row), end_section=row is self.rows[-1])
        table.add_row(*_cells(self.total))
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()


def _cells(row: ProfileRow) -> tuple[str, ...]:
    return (
        row.name,
        row.kind,
        f"{row.parameters:,}",
        f"{row.nonzeros:,}",
        f"{row.bytes:,.0f}",
        f"{row.flops / 1e6:,.3f}",
        f"{row.effective_flops / 1e6:,.3f}",
        f"{1e6 * row.latency.median:,.0f}",
        f"{1e6 * row.latency.iqr:,.0f}",
    )


def profile(
    model: nn.Module | CompressedModel,
    example: Any,
    *,
    threads: int | None = None,
    min_seconds: float = 1.0,
) -> Profile:
    """Count and time one forward pass in evaluation mode, module by module.

    Operations are counted by :func:`~lightning_condensa.deploy.flops.count_flops`. A module's time
    is its own, without that of the modules it calls; times of rows add up to a little more than
    the total, which is measured without clocks inside.

    Args:
        model: A module, or what compression made of one; not changed.
        example: An input batch, or a tuple of positional inputs.
        threads: CPU threads; all that torch uses where ``None``.
        min_seconds: Measuring time.

    Raises:
        ValueError: If ``threads`` or ``min_seconds`` is not positive, or the model is a sparse
            one, which has a report of its own.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        >>> report = profile(net, torch.rand(2, 8), min_seconds=0.01)
        >>> [(row.name, row.flops) for row in report.rows]
        [('0', 128), ('1', 0)]
    """
    check_threads(threads)
    if not min_seconds > 0:
        raise ValueError(f"min_seconds must be positive, got {min_seconds!r}")
    module = model.module if isinstance(model, CompressedModel) else model
    if isinstance(module, SparseModel):
        raise ValueError("model must be dense: what a sparse model does is in its report")
    theta = model.theta if isinstance(model, CompressedModel) else {}
    module = getattr(module, "_orig_mod", module)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    inputs = example if isinstance(example, tuple) else (example,)
    inputs = tuple(i.to(device) if isinstance(i, Tensor) else i for i in inputs)
    parts = {n: e.density for n, e in theta.items() if len(e.leaves) > 1}
    flops = count_flops(module, inputs, parts)
    runner = deepcopy(module).eval()
    with torch_threads(threads) as used, torch.inference_mode():
        measured = compare({"": lambda: runner(*inputs)}, min_seconds=min_seconds / 2)
        seconds = _times(runner, inputs, min_seconds / 2)
    rows = tuple(
        _row(name, part, theta, flops.get(name, FlopCount()), seconds[name])
        for name, part in module.named_modules()
        if name in seconds and type(part) is not nn.Sequential  # which does nothing itself
    )
    total = _total(module, rows, measured.timing(""))
    return Profile(rows, total, used, str(device))


def _row(
    name: str,
    module: nn.Module,
    theta: Mapping[str, Encoding],
    flops: FlopCount,
    seconds: list[float],
) -> ProfileRow:
    parameters = [p.detach() for p in module.parameters(recurse=False)]
    size = 0.0
    prefix = f"{name}." if name else ""
    for key, tensor in (*module.named_parameters("", False), *module.named_buffers("", False)):
        encoded = theta.get(prefix + key)
        dense = tensor.numel() * tensor.element_size()
        size += dense if encoded is None else encoded.storage_bits / 8
    return ProfileRow(
        name,
        type(module).__name__,
        sum(p.numel() for p in parameters),
        sum(int(torch.count_nonzero(p)) for p in parameters),
        size,
        flops.dense,
        flops.effective,
        Timing.of(tuple(seconds)),
    )


def _total(module: nn.Module, rows: tuple[ProfileRow, ...], latency: Timing) -> ProfileRow:
    return ProfileRow(
        "",
        type(module).__name__,
        sum(r.parameters for r in rows),
        sum(r.nonzeros for r in rows),
        sum(r.bytes for r in rows),
        sum(r.flops for r in rows),
        sum(r.effective_flops for r in rows),
        latency,
    )


def _times(
    module: nn.Module, inputs: tuple[Any, ...], min_seconds: float
) -> dict[str, list[float]]:
    """Seconds that each module of a forward pass takes itself, in every run.

    Modules that are never called have no entry unless they hold tensors; theirs are zeros.
    """
    clock = _Clock()
    for name, part in module.named_modules():
        part.register_forward_pre_hook(clock.enter(name))
        part.register_forward_hook(clock.leave)
    runs: list[dict[str, float]] = []
    end = time.perf_counter() + min_seconds
    while len(runs) < _LEAST_RUNS or time.perf_counter() < end:
        clock.seconds.clear()
        module(*inputs)
        runs.append(dict(clock.seconds))
    holders = {n for n, m in module.named_modules() if [*m.parameters(False), *m.buffers(False)]}
    names = holders.union(*runs)
    return {name: [run.get(name, 0.0) for run in runs] for name in names}


class _Clock:
    """Adds up the time that each module takes itself, from hooks around its forward."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[str] = []
        self._since = 0.0

    def enter(self, name: str) -> Any:
        """A hook that runs before the forward of a module."""

        def hook(*_: Any) -> None:
            self._switch()
            self._inside.append(name)

        return hook

    def leave(self, *_: Any) -> None:
        """A hook that runs after it."""
        self._switch()
        self._inside.pop()

    def _switch(self) -> None:
        """Give the time since the last switch to the module that it was spent in."""
        finish()
        now = time.perf_counter()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now
