"""Layers of low rank as two layers in a row: what makes a small rank fast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Size, nn

from lightning_condensa.deploy.equality import Equality
from lightning_condensa.schemes import Encoded, Encoding

M = TypeVar("M", bound=nn.Module)

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class Factored(NamedTuple, Generic[M]):
    """What :func:`factored` makes.

    Attributes:
        module: The copy.
        theta: θ of its parameters: factors where a layer became two.
        stays: Weight of low rank → why its layer stays as it is.
    """

    module: M
    theta: dict[str, Encoding]
    stays: dict[str, str]


def factored(module: M, theta: Mapping[str, Encoding], example: Any) -> Factored[M]:
    """A copy of a module in which each layer of low rank is two layers, with θ's factors.

    A linear layer ``x → W x + b`` with ``W = L R`` becomes ``R`` and then ``L`` with the bias; a
    convolution becomes one with as many filters as the rank, and then one of kernel size 1. Every
    step is verified: the module runs on the example, and on the example with noise, and the outputs
    must be those of the module but for what rounding the product to the weight's type changes.

    Args:
        module: The module, which holds Δ(θ); left as it is.
        theta: θ by parameter name.
        example: An input in Lightning's ``example_input_array`` convention.
    """
    copy, found, stays = deepcopy(module), dict(theta), dict[str, str]()
    tolerance = math.sqrt(max(torch.finfo(e.dtype).eps for e in theta.values())) if theta else 0.0
    equality = Equality(module, example, tolerance)
    for name, encoding in theta.items():
        if not is_product(encoding):
            continue
        layer = _divisible(copy, name)
        if isinstance(layer, str):
            stays[name] = layer
            continue
        path = name.rpartition(".")[0]
        left, right = encoding.terms[0]
        first, second = _pair(layer, len(right.codes))
        factors = (_seen_as(right, first.weight.shape), _seen_as(left, second.weight.shape))
        _fill((first, second), layer, factors)
        copy.set_submodule(path, nn.Sequential(first, second).train(layer.training))
        try:
            equality.check(copy)
        except Exception as error:  # whatever the user's code raises; a reason, shown in the report
            copy.set_submodule(path, layer)
            stays[name] = f"not two layers: {type(error).__name__}: {error}".splitlines()[0]
            continue
        del found[name]
        found |= {f"{path}.{i}.weight": factor for i, factor in enumerate(factors)}
    return Factored(copy, found, stays)


def is_product(encoding: Encoding) -> bool:
    """Whether a weight is one product of two factors."""
    return len(encoding.terms) == 1 and len(encoding.terms[0]) == 2


def _divisible(module: nn.Module, name: str) -> Layer | str:
    """The layer of a weight, or why it cannot be two."""
    path, _, attribute = name.rpartition(".")
    layer = module.get_submodule(path)
    # Subclasses may compute something else.
    known = type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if not known or not isinstance(layer, Layer) or not path or attribute != "weight":
        return f"not two layers: it is {attribute} of {type(layer).__name__}"
    if not isinstance(layer, nn.Linear) and layer.groups > 1:
        return "not two layers: its convolution has groups"
    if sum(p is layer.weight for _, p in module.named_parameters(remove_duplicate=False)) > 1:
        return "not two layers: other layers share it"
    return layer


def _pair(layer: Layer, rank: int) -> tuple[Layer, Layer]:
    """Two layers for the place of one, with values yet to come."""
    kind: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False, **kind)
        return first, nn.Linear(rank, layer.out_features, bias=bias, **kind)
    convolution: Any = type(layer)
    window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    kind["padding_mode"] = layer.padding_mode
    return (
        convolution(layer.in_channels, rank, *window, bias=False, **kind),
        convolution(rank, layer.out_channels, 1, bias=bias, **kind),
    )


@torch.no_grad()
def _fill(pair: tuple[Layer, Layer], layer: Layer, factors: tuple[Encoded, Encoded]) -> None:
    for part, factor in zip(pair, factors, strict=True):
        part.weight.copy_(factor.decode())
        part.weight.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        pair[1].bias = layer.bias


def _seen_as(factor: Encoded, shape: Size) -> Encoded:
    """A factor in the shape of a layer's weight."""
    if factor.shape == shape:
        return factor
    scale = factor.scale
    if factor.group is not None or (scale is not None and scale.shape[1] > 1):
        return Encoded.dense(factor.decode().view(shape))
    if scale is not None:
        scale = scale.view(-1, *[1] * (len(shape) - 1))
    mask = None if factor.mask is None else factor.mask.view(shape)
    return factor.replace(codes=factor.codes.view(shape), mask=mask, scale=scale)
