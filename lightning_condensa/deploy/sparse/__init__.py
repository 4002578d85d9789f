"""Run a model on its non-zero weights, layer by layer in the way that is fastest here."""

from lightning_condensa.deploy.sparse.choice import SparseMismatchError, SparseRow
from lightning_condensa.deploy.sparse.compiler import KernelUnavailableError
from lightning_condensa.deploy.sparse.model import SparseModel, to_sparse
from lightning_condensa.deploy.sparse.report import SparseReport
from lightning_condensa.deploy.sparse.semi_structured import to_semi_structured

__all__ = [
    "KernelUnavailableError",
    "SparseMismatchError",
    "SparseModel",
    "SparseReport",
    "SparseRow",
    "to_semi_structured",
    "to_sparse",
]
