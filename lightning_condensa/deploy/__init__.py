"""From θ to files: the compressed model, its report and the packed format."""

from lightning_condensa.deploy.compressed import CompressedModel, load_theta
from lightning_condensa.deploy.errors import PackedFileError
from lightning_condensa.deploy.export import OnnxLayer, OnnxReport
from lightning_condensa.deploy.loading import load_compressed
from lightning_condensa.deploy.packed import (
    Packed,
    inspect_packed,
    load_tensors,
    pack,
    read_packed,
    unpack,
    write_packed,
)
from lightning_condensa.deploy.plan import Plan, apply_plan, plan_from_json, plan_to_json
from lightning_condensa.deploy.profile import Profile, ProfileRow, profile
from lightning_condensa.deploy.report import LayerRow, Report
from lightning_condensa.deploy.shrink import shrink
from lightning_condensa.deploy.sparse import (
    KernelUnavailableError,
    SparseMismatchError,
    SparseModel,
    SparseReport,
    SparseRow,
    to_semi_structured,
    to_sparse,
)
from lightning_condensa.deploy.timing import Comparison, Ratio, Timing, compare
from lightning_condensa.deploy.transplant import transplant_optimizer

__all__ = [
    "Comparison",
    "CompressedModel",
    "KernelUnavailableError",
    "LayerRow",
    "OnnxLayer",
    "OnnxReport",
    "Packed",
    "PackedFileError",
    "Profile",
    "ProfileRow",
    "Ratio",
    "Report",
    "SparseMismatchError",
    "SparseModel",
    "SparseReport",
    "SparseRow",
    "Timing",
    "compare",
    "Plan",
    "apply_plan",
    "inspect_packed",
    "load_compressed",
    "load_tensors",
    "load_theta",
    "pack",
    "profile",
    "read_packed",
    "to_semi_structured",
    "to_sparse",
    "plan_from_json",
    "plan_to_json",
    "shrink",
    "transplant_optimizer",
    "unpack",
    "write_packed",
]
