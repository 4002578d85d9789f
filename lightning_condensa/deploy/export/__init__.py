"""Compressed models in the formats of other runtimes: ONNX and ``torch.export``."""

from __future__ import annotations

from importlib.util import find_spec

from lightning_condensa.deploy.export.report import OnnxLayer, OnnxReport
from lightning_condensa.deploy.export.tracing import program_bytes, trace

__all__ = ["OnnxLayer", "OnnxReport", "program_bytes", "require_onnx", "trace"]


def require_onnx() -> None:
    """Check that the packages are there that ONNX files are made with.

    Raises:
        ImportError: If they are not; it names the extra.
    """
    missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if find_spec(p) is None]
    if missing:
        raise ImportError(
            f"export to ONNX needs {', '.join(missing)}: pip install lightning-condensa[onnx]"
        )
