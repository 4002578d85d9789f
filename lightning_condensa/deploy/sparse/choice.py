"""Which way of computing a layer is the fastest, by measurement."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_condensa.deploy.sparse.calls import Call
from lightning_condensa.deploy.sparse.compiler import KernelUnavailableError
from lightning_condensa.deploy.sparse.direct import DirectLayer
from lightning_condensa.deploy.sparse.layers import DenseLayer, Epilogue, SparseLayer
from lightning_condensa.deploy.sparse.matrix import MatrixLayer, block_side
from lightning_condensa.deploy.timing import Comparison, Ratio, compare

Method = Literal["dense", "csr", "bsr", "direct", "direct, one thread", "2:4"]

#: A layer is exchanged if it is faster by this factor, and in three rounds of four.
MARGIN = 1.05
#: Why a layer stays dense that no example reaches.
NOT_CALLED = "is not called on the example"
_MAX_DENSITY = 0.5
_SECONDS = 0.1


@dataclass(frozen=True)
class SparseRow:
    """How one layer is computed, and why.

    Attributes:
        name: Of the layer in the module.
        layer: Its kind and settings.
        inputs: Shape that it was measured on; empty where it was not.
        density: Share of weights that are not zero.
        method: What it uses.
        speedup: Over dense, of ``method``; ``None`` where nothing was measured.
        seconds: Median of each method that was measured.
        reason: Why it stays dense or why a method was not tried; empty otherwise.
    """

    name: str
    layer: str
    inputs: tuple[int, ...]
    density: float
    method: Method
    speedup: Ratio | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str = ""


class SparseMismatchError(RuntimeError):
    """A sparse layer or model gives other outputs than the dense one."""


def density_of(layer: nn.Conv2d | nn.Linear) -> float:
    """Share of a layer's weights that are not zero."""
    return int(torch.count_nonzero(layer.weight)) / max(layer.weight.numel(), 1)


def choose(name: str, dense: DenseLayer, call: Call | None) -> tuple[nn.Module, SparseRow]:
    """The fastest way to compute a layer.

    Args:
        name: Of the layer.
        dense: The layer.
        call: What it got and gave on the example; ``None`` if it was not called.

    Returns:
        The layer that is used, and the row of the report.

    Raises:
        SparseMismatchError: If a sparse layer's outputs are wrong.
    """
    layer = dense.layer
    density = density_of(layer)
    row = partial(SparseRow, name, str(layer), tuple(call[0].shape) if call else (), density)
    why_not = _why_not(layer, density, call)
    if call is None or why_not:
        return dense, row("dense", reason=why_not)
    candidates, reason = _candidates(dense)
    x = call[0]
    for method, candidate in candidates.items():
        _check(name, method, candidate, dense, x)
    layers: dict[str, nn.Module] = {"dense": dense, **candidates}
    functions: dict[str, Callable[[], Any]] = {m: partial(c, x) for m, c in layers.items()}
    measured = compare(functions, min_seconds=_SECONDS)
    method, speedup = fastest(measured)
    if method == "dense" and not reason:
        reason = "no sparse method is faster"
    seconds = {m: measured.timing(m).median for m in layers}
    return layers[method], row(method, speedup, seconds, reason)


def share_threads(joined: DirectLayer, x: Tensor) -> bool:
    """Whether layers in a row are faster if all of them run in all threads.

    Alone a small one may be faster in one thread: then the others are not awake yet.
    """
    shared = joined.shared()
    if shared is joined:
        return False
    functions = {"chosen": partial(joined, x), "shared": partial(shared, x)}
    measured = compare(functions, min_seconds=_SECONDS)
    return measured.speedup("shared", "chosen").median > 1


def _why_not(layer: nn.Conv2d | nn.Linear, density: float, call: Call | None) -> str:
    if call is None:
        return NOT_CALLED
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"groups={layer.groups}"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}"
    for tensor in (*call, layer.weight):
        if tensor.dtype != torch.float32:
            return f"computes in {str(tensor.dtype).removeprefix('torch.')}"
    if call[0].numel() == 0 or layer.weight.numel() == 0:
        return "has nothing to compute"
    if density > _MAX_DENSITY:
        return f"{density:.0%} of its weights are not zero"
    return ""


def _candidates(dense: DenseLayer) -> tuple[dict[str, SparseLayer], str]:
    """The ways to compute a layer from its non-zero weights, and what is missing."""
    found: dict[str, SparseLayer] = {"csr": MatrixLayer(dense)}
    side = block_side(dense.layer.weight.detach())
    if side is not None:
        found["bsr"] = MatrixLayer(dense, side)
    try:
        found["direct"] = DirectLayer(dense)
        if torch.get_num_threads() > 1:  # a small layer is done before other threads are awake
            found["direct, one thread"] = DirectLayer(dense, alone=True)
    except KernelUnavailableError as error:
        return found, str(error)
    return found, ""


def fastest(measured: Comparison) -> tuple[Method, Ratio]:
    """The fastest method, if it clearly is, and how many times faster than dense; else dense."""
    order = sorted(measured.seconds, key=lambda m: measured.timing(m).median)
    for method in order[: order.index("dense")]:
        speedup = measured.speedup(method, "dense")
        if speedup.median >= MARGIN and speedup.low > 1:
            return method, speedup  # type: ignore[return-value]
    return "dense", Ratio(1.0, 1.0, 1.0)


def _check(name: str, method: str, candidate: nn.Module, dense: DenseLayer, x: Tensor) -> None:
    """Compare with float64 under the error bound of a float32 sum in any order.

    A sum of n products differs from the true one by at most n u/(1 - n u) times the sum of their
    magnitudes (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1), u being
    half a unit in the last place.
    """
    exact = deepcopy(dense).double()
    magnitude = DenseLayer(deepcopy(exact.layer), Epilogue(False, dense.epilogue.pool))
    for parameter in magnitude.parameters():
        parameter.data.abs_()
    terms = int(torch.count_nonzero(dense.layer.weight.flatten(1), dim=1).max()) + 2
    bound = magnitude(x.double().abs()) * terms * torch.finfo(torch.float32).eps
    outputs, wanted = candidate(x), exact(x.double())
    if outputs.shape != wanted.shape or not bool(((outputs - wanted).abs() <= bound).all()):
        raise SparseMismatchError(
            f"{method} gives other outputs than {name} ({dense.layer}) on an input of shape "
            f"{tuple(x.shape)}: please report this"
        )
