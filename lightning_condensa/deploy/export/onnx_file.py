"""A compressed model as an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_condensa.deploy.export.calibration import Activation, calibrate, input_batches
from lightning_condensa.deploy.export.codebook import is_codebook, store_codebook
from lightning_condensa.deploy.export.graph import OnnxGraph
from lightning_condensa.deploy.export.half import to_half
from lightning_condensa.deploy.export.integer import (
    IntegerLayer,
    StaysFloatError,
    has_integer_codes,
    integer_layers,
    write_float,
)
from lightning_condensa.deploy.export.qdq import (
    Placement,
    grids,
    with_bias_steps,
    write_activation,
    write_integer,
)
from lightning_condensa.deploy.export.report import OnnxLayer
from lightning_condensa.deploy.export.tracing import eager, inputs_of, trace
from lightning_condensa.schemes import Encoded, Encoding

PRECISIONS = ("float32", "float16", "int8")


def onnx_file(
    module: nn.Module,
    theta: Mapping[str, Encoding],
    example: Any,
    precision: str,
    calibration: Any,
) -> tuple[bytes, tuple[OnnxLayer, ...]]:
    """See :meth:`lightning_condensa.CompressedModel.to_onnx`.

    Args:
        module: The module, with Δ(θ) in its parameters.
        theta: θ by parameter name.
        example: See :func:`~.tracing.inputs_of`.
        precision: ``"float32"``, ``"float16"`` or ``"int8"``.
        calibration: See :func:`~.calibration.input_batches`; ``None`` unless ``"int8"``.

    Returns:
        The bytes of the file, and what became of each parameter in θ.

    Raises:
        ValueError: If an argument is none of these, or no layer can be computed in int8.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}")
    integer = precision == "int8"
    if integer != (calibration is not None):
        raise ValueError(
            "precision='int8' needs calibration: a LightningDataModule or batches of inputs"
            if integer
            else f"calibration is for precision='int8', got precision={precision!r}"
        )
    batches = input_batches(calibration, len(inputs_of(example))) if integer else []
    single = {name: e.leaves[0] for name, e in theta.items() if len(e.leaves) == 1}
    encoded = {n: e.whole().to(torch.device("cpu")) for n, e in single.items()}
    books = {name for name, e in encoded.items() if is_codebook(e)}
    traced = _traced_names(module, encoded)
    # Others stay constants of the graph, which can be folded: γ and β of a norm, say.
    integers = {name for name, e in encoded.items() if integer and has_integer_codes(e)}
    opened = {t: n for t, n in traced.items() if n in integers or n in books}
    graph = OnnxGraph(trace(module, example), opened)

    stored = dict.fromkeys(theta, "float16" if precision == "float16" else "float32")
    reasons = dict.fromkeys(theta, "")
    if integer:
        reasons = dict.fromkeys(theta, "a sum or product of tensors")
        reasons |= dict.fromkeys(encoded, "not integer codes")
        reasons |= dict.fromkeys(integers, "not used by forward as it is")
    weights = {name: encoded[opened[name]] for name in graph.open}
    for name in [n for n in weights if opened[n] in books]:
        reasons[opened[name]] = "a codebook" if integer else ""
        if store_codebook(graph, name, weights.pop(name)):
            stored[opened[name]] = "codebook"
    if integer:
        for name, reason in _write_integers(graph, weights, batches).items():
            reasons[opened[name]] = reason
            if not reason:
                stored[opened[name]] = "int8"
        if "int8" not in stored.values():
            listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5])
            raise ValueError(f"precision='int8': no weight can be computed with in int8 ({listed})")
    rows = tuple(OnnxLayer(name, stored[name], reasons[name]) for name in theta)
    data = graph.serialize()
    return to_half(data) if precision == "float16" else data, rows


def _traced_names(module: nn.Module, theta: Mapping[str, Encoded]) -> dict[str, str]:
    """Names under which a traced graph may know compressed parameters, and theirs in θ."""
    own = {id(p): name for name, p in module.named_parameters() if name in theta}
    traced = eager(module).named_parameters(remove_duplicate=False)
    return {name: own[id(p)] for name, p in traced if id(p) in own}


def _write_integers(
    graph: OnnxGraph, weights: Mapping[str, Encoded], batches: Sequence[tuple[Tensor, ...]]
) -> dict[str, str]:
    """Turn all layers into integer ones that can be; why not, for each open weight."""
    reasons = dict.fromkeys(weights, "")
    layers: list[IntegerLayer] = []
    for name, encoded in weights.items():
        try:
            found = integer_layers(graph, name, encoded)
        except StaysFloatError as error:
            reasons[name] = str(error)
            graph.close(name, encoded.decode())
            continue
        for position, layer in enumerate(found):
            write_float(graph, layer, position)
        graph.drop(name)
        layers += found
    if not layers:
        return reasons

    placement = Placement(graph, layers)
    extra = [v for v in placement.values if not v.is_graph_input() and not v.is_graph_output()]
    names = [str(v.name) for v in placement.values]
    measured = calibrate(graph.serialize(extra), names, batches)
    # With fewer layers in integers other values may follow another grid, but none is new.
    while refused := _beyond_int32(layers, grids(placement, measured)):
        reasons |= dict.fromkeys(refused, "a bias is beyond the range of int32")
        layers = [layer for layer in layers if layer.weight not in refused]
        placement = Placement(graph, layers)
    rounding = grids(placement, measured)
    read = {layer.node: rounding[layer.input_name] for layer in layers}
    for value in placement.values:
        write_activation(graph, placement, value, rounding[str(value.name)])
    for layer in layers:
        grid = read[layer.node]
        ready = with_bias_steps(layer, grid)
        assert ready is not None
        write_integer(graph, ready, grid)
    return reasons


def _beyond_int32(layers: Sequence[IntegerLayer], rounding: Mapping[str, Activation]) -> set[str]:
    """The weights of layers whose bias needs more than 32 bits."""
    return {
        layer.weight
        for layer in layers
        if with_bias_steps(layer, rounding[layer.input_name]) is None
    }
