"""ONNX Runtime, as far as an export needs it."""

from __future__ import annotations

from typing import Any

import onnxruntime


def session(model: bytes) -> Any:
    """A quiet session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
