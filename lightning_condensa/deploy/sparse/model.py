"""A model of which each layer is computed in the way that was measured to be fastest."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_condensa.deploy.sparse.calls import called_modules, record_calls
from lightning_condensa.deploy.sparse.choice import (
    NOT_CALLED,
    SparseMismatchError,
    SparseRow,
    choose,
    density_of,
    share_threads,
)
from lightning_condensa.deploy.sparse.direct import DirectLayer
from lightning_condensa.deploy.sparse.fusion import gather_layers, join_layers
from lightning_condensa.deploy.sparse.layers import DenseLayer
from lightning_condensa.deploy.sparse.outputs import alike
from lightning_condensa.deploy.sparse.report import SparseReport
from lightning_condensa.deploy.threads import check_threads, torch_threads

#: Largest difference between the outputs of the sparse and the dense model, over the largest
#: output: rounding errors of single layers, which are checked strictly, grow on their way.
_TOLERANCE = 1e-4


class SparseModel(nn.Module):
    """A model for inference that skips weights that are zero.

    It gives what the dense model in evaluation mode gives, within rounding. It can't be trained. It
    is made by :func:`to_sparse` for the CPU, and by :func:`to_semi_structured` for CUDA.

    Args:
        module: Whose layers were exchanged.
        report: What they use.

    Attributes:
        report: What each layer uses.
    """

    def __init__(self, module: nn.Module, report: SparseReport) -> None:
        super().__init__()
        self.module = module
        self.report = report
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the model, without a graph.

        Raises:
            RuntimeError: If an input needs gradients.
        """
        tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError("a sparse model gives no gradients: use the dense model for them")
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> SparseModel:
        """Stay in evaluation mode.

        Raises:
            RuntimeError: If asked to train.
        """
        if mode:
            raise RuntimeError(
                "a sparse model is for inference only: train the dense model instead"
            )
        super().train(False)
        return self


def to_sparse(module: nn.Module, example: Any, threads: int | None = None) -> SparseModel:
    """Make a model that skips zero weights wherever that is faster.

    Each Conv2d and Linear layer is measured on what it gets from the example: as it is, as a CSR
    matrix, as a BSR matrix if its weights stand in blocks, and with the bundled kernel. A batch
    norm, ReLU and max pooling after it are computed with it where `torch.fx` can follow the
    module. A layer that gains less than 5 %, or can't be computed sparsely, stays dense.

    Args:
        module: With zeros in its weights; not changed.
        example: An input batch, or a tuple of positional inputs, of the size that the model will
            be used with. Other sizes work, too, but were not measured.
        threads: CPU threads to measure with; as many as torch uses where ``None``. When the model
            runs, it uses as many as torch does.

    Returns:
        The model, with its :class:`SparseReport`.

    Raises:
        ValueError: If ``threads`` is not positive.
        SparseMismatchError: If outputs differ from those of ``module`` by more than rounding.

    Example:
        >>> from lightning_condensa import CompressedModel, Prune
        >>> net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> sparse = CompressedModel.compress(net, Prune(0.01)).to_sparse(torch.rand(1, 256))
        >>> [row.name for row in sparse.report.rows]
        ['0', '2']
    """
    check_threads(threads)
    inputs = example if isinstance(example, tuple) else (example,)
    inputs = tuple(i.detach().cpu() if isinstance(i, Tensor) else i for i in inputs)
    dense = deepcopy(getattr(module, "_orig_mod", module)).cpu().eval().requires_grad_(False)
    with torch_threads(threads) as used, torch.no_grad():
        wanted, called = called_modules(dense, inputs)
        exchanged, rows = _exchange(_gather(dense, inputs, wanted), inputs)
        sparse = SparseModel(exchanged, SparseReport((*rows, *_left(dense, rows, called)), used))
        if not alike(sparse(*inputs), wanted, _TOLERANCE):
            raise SparseMismatchError(
                f"the sparse {type(module).__name__} gives other outputs than the dense one"
            )
    return sparse


def _gather(dense: nn.Module, inputs: tuple[Any, ...], wanted: Any) -> nn.Module:
    """The module with its layers gathered, as far as it still works.

    A trace holds only what happened to a proxy, and untraced code may read what it is not to call.
    """
    failure = ""
    for trace in (True, False):
        gathered = gather_layers(deepcopy(dense), trace=trace)
        try:
            if alike(gathered(*inputs), wanted, _TOLERANCE):
                return gathered
            failure = "it gives other outputs then"
        except Exception as error:  # whatever the user's code does then
            failure = f"it fails then with {type(error).__name__}: {error}"
    warnings.warn(
        f"no layer of {type(dense).__name__} can be exchanged: {failure}", UserWarning, stacklevel=3
    )
    return deepcopy(dense)


def _exchange(gathered: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, list[SparseRow]]:
    """Exchange the gathered layers for the fastest ones, and join those in a row."""
    holder = nn.ModuleDict({"root": gathered})
    layers = {n: m for n, m in holder.named_modules() if isinstance(m, DenseLayer)}
    calls = record_calls(layers, gathered, inputs)
    rows = {}
    for name, layer in layers.items():
        chosen, row = choose(name.removeprefix("root").removeprefix("."), layer, calls.get(name))
        holder.set_submodule(name, chosen)
        rows[name] = row
    for name, names in join_layers(holder).items():
        joined = holder.get_submodule(name)
        assert isinstance(joined, DirectLayer)
        if share_threads(joined, calls[name][0]):
            holder.set_submodule(name, joined.shared())
            rows |= {n: replace(rows[n], method="direct") for n in names}
    return holder["root"], list(rows.values())


def _left(dense: nn.Module, rows: list[SparseRow], called: set[str]) -> list[SparseRow]:
    """Rows of layers that are not called, or that can't be taken out of the module."""
    taken = {row.name for row in rows}
    why = (NOT_CALLED, "others read its weights, or it has hooks or a subclass")
    return [
        SparseRow(name, str(m), (), density_of(m), "dense", reason=why[name in called])
        for name, m in dense.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and name not in taken
    ]
