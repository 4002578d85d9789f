"""A module made ready to run in one of several engines."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_condensa.deploy.export.quiet import quiet_export
from lightning_condensa.deploy.sparse import to_sparse

Engine = Literal["eager", "compile", "onnxruntime", "sparse"]


def prepare(
    module: nn.Module, inputs: tuple[Any, ...], engine: Engine, threads: int, device: torch.device
) -> Callable[[], Any]:
    """A call of a copy of ``module``, in evaluation mode, on ``inputs``.

    Args:
        module: Not changed.
        inputs: Positional inputs, on ``device``.
        engine: ``"eager"``; ``"compile"``, `torch.compile`; ``"onnxruntime"``, after an export
            with `torch.onnx`; ``"sparse"``, see
            :func:`~lightning_condensa.deploy.sparse.to_sparse`.
        threads: CPU threads of ONNX Runtime, and those that sparse layers are chosen for; torch
            runs in those that are set when it is called.
        device: Where to run.

    Raises:
        ValueError: If the engine is unknown or can't run on the device.
        ImportError: If ONNX Runtime is not installed.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {get_args(Engine)}, got {engine!r}")
    if engine in ("onnxruntime", "sparse") and device.type != "cpu":
        raise ValueError(f"engine={engine!r} runs on the CPU, got device={str(device)!r}")
    plain = getattr(module, "_orig_mod", module)
    if engine == "sparse":
        return _call(to_sparse(plain, inputs, threads), inputs)
    copy = deepcopy(plain).to(device).eval()
    if engine == "onnxruntime":
        return _session(copy, inputs, threads)
    return _call(torch.compile(copy) if engine == "compile" else copy, inputs)


def _call(module: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return module(*inputs)

    return run


def _session(module: nn.Module, inputs: tuple[Any, ...], threads: int) -> Callable[[], Any]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise ImportError(
            "engine='onnxruntime' needs ONNX Runtime: pip install 'lightning-condensa[onnx]'"
        ) from error
    with torch.no_grad(), quiet_export():
        program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    arrays = [i.detach().numpy() for i in inputs if isinstance(i, Tensor)]
    feed = {i.name: array for i, array in zip(session.get_inputs(), arrays, strict=True)}
    return lambda: session.run(None, feed)
