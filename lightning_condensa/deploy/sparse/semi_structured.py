"""Linear layers of which two weights in four are zero, on the tensor cores of CUDA devices."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from lightning_condensa.deploy.sparse.calls import called_modules, record_calls
from lightning_condensa.deploy.sparse.choice import (
    NOT_CALLED,
    SparseMismatchError,
    SparseRow,
    density_of,
    fastest,
)
from lightning_condensa.deploy.sparse.model import SparseModel
from lightning_condensa.deploy.sparse.outputs import alike
from lightning_condensa.deploy.sparse.report import SparseReport
from lightning_condensa.deploy.timing import compare

DTYPES = (torch.float16, torch.bfloat16)
#: Rows and columns of a weight must be multiples: what both of torch's kernels take.
ROWS, COLUMNS = 32, 64
#: The first CUDA compute capability with sparse tensor cores.
CAPABILITY = (8, 0)
DEVICE = "cuda"
_SECONDS = 0.1


def to_semi_structured(
    module: nn.Module, example: Any, dtype: torch.dtype = torch.float16
) -> SparseModel:
    """Make a model for a CUDA device that skips two weights in four wherever that is faster.

    Each Linear layer whose weights are 2:4 sparse, as :class:`~lightning_condensa.NMPrune` leaves
    them, is measured on what it gets from the example: dense, and with `torch.sparse`'s
    semi-structured weights. A layer that gains less than 5 % stays dense.

    Args:
        module: Not changed.
        example: An input batch, or a tuple of positional inputs, of the size that the model will
            be used with; it may be on any device. Floating point tensors are cast to ``dtype``.
        dtype: That the model computes in: float16 or bfloat16.

    Returns:
        The model, on the CUDA device, with its :class:`SparseReport`.

    Raises:
        ValueError: If ``dtype`` is another one.
        RuntimeError: If there is no CUDA device with sparse tensor cores.
        SparseMismatchError: If outputs differ from those of the dense model by more than rounding.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype!r}")
    _require_device()
    dense = deepcopy(getattr(module, "_orig_mod", module)).eval().requires_grad_(False)
    dense = dense.to(DEVICE, dtype)
    inputs = tree_map(partial(_moved, dtype=dtype), _as_tuple(example))
    with torch.no_grad():
        wanted, called = called_modules(dense, inputs)
        sparse = SparseModel(*_exchange(deepcopy(dense), inputs, called))
        _check(type(module).__name__, sparse(*inputs), wanted, dtype)
    return sparse


def is_semi_structured(weight: Tensor) -> bool:
    """Whether no four consecutive inputs of an output have more than two weights that are not zero.

    Args:
        weight: Of shape (outputs, inputs).

    Example:
        >>> is_semi_structured(torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 3.0, 0.0]]))
        True
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).reshape(len(weight), -1, 4).sum(2) <= 2).all())


def why_not(layer: nn.Linear) -> str:
    """Why a layer's weights can't be semi-structured; empty if they can."""
    rows, columns = layer.weight.shape
    if rows == 0 or columns == 0 or rows % ROWS or columns % COLUMNS:
        return f"{rows} × {columns} weights are no multiples of {ROWS} × {COLUMNS}"
    if not is_semi_structured(layer.weight):
        return "its weights are not 2:4 sparse"
    return ""


def _require_device() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("2:4 layers need a CUDA device: to_sparse is for the CPU")
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        raise RuntimeError(
            f"2:4 layers need a CUDA device of capability {CAPABILITY} at least, "
            f"{torch.cuda.get_device_name()} has {capability}"
        )


def _as_tuple(example: Any) -> tuple[Any, ...]:
    return example if isinstance(example, tuple) else (example,)


def _moved(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(DEVICE, dtype if value.is_floating_point() else None)


def _exchange(
    module: nn.Module, inputs: tuple[Any, ...], called: set[str]
) -> tuple[nn.Module, SparseReport]:
    """Exchange the weights of layers that get faster."""
    linear = {n: m for n, m in module.named_modules() if type(m) is nn.Linear}
    calls = record_calls(linear, module, inputs)
    rows = []
    for name, part in module.named_modules():
        if not isinstance(part, nn.Linear | nn.Conv2d):
            continue
        row = partial(SparseRow, name, str(part))
        density = density_of(part)
        if name not in called:
            rows.append(row((), density, "dense", reason=NOT_CALLED))
        elif name not in calls:
            rows.append(row((), density, "dense", reason="is no plain Linear layer"))
        else:
            rows.append(_choose(name, linear[name], calls[name][0]))
    return module, SparseReport(tuple(rows), None)


def _choose(name: str, layer: nn.Linear, x: Tensor) -> SparseRow:
    """Measure a layer on its input, and exchange its weight if that makes it faster."""
    row = partial(SparseRow, name, str(layer), tuple(x.shape), density_of(layer))
    reason = why_not(layer)
    if reason:
        return row("dense", reason=reason)
    weight = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
    functions: dict[str, Callable[[], Any]] = {
        "dense": partial(functional.linear, x, layer.weight, layer.bias),
        "2:4": partial(functional.linear, x, weight, layer.bias),
    }
    _check(name, functions["2:4"](), functions["dense"](), x.dtype)
    measured = compare(functions, min_seconds=_SECONDS)
    method, speedup = fastest(measured)
    seconds = {m: measured.timing(m).median for m in functions}
    if method == "dense":
        return row("dense", speedup, seconds, "2:4 is not faster")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return row(method, speedup, seconds)


def _check(name: str, ours: Any, wanted: Any, dtype: torch.dtype) -> None:
    """Compare outputs, up to a few units in the last place of the largest of a tensor.

    Raises:
        SparseMismatchError: If they differ by more.
    """
    if not alike(ours, wanted, 16 * torch.finfo(dtype).eps):
        raise SparseMismatchError(f"2:4 gives other outputs than dense in {name}")
