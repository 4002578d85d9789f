"""ONNX Runtime as a user would set it up for an int8 model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
from common import has_vnni


def session(path: Path) -> Any:
    """A session on one thread, exact on every processor: see docs/export.md."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if not has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
