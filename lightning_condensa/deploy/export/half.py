"""Half precision for a finished ONNX file."""

from __future__ import annotations

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16


def to_half(model: bytes) -> bytes:
    """The file with float16 for float32, but for its inputs and outputs.

    Operators that runtimes have no float16 for stay as they are, between casts.
    """
    proto = onnx.load_model_from_string(model)
    half = convert_float_to_float16(proto, keep_io_types=True, disable_shape_infer=True)
    data: bytes = half.SerializeToString(deterministic=True)
    return data
