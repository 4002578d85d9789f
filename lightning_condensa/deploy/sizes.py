"""What layers say of their sizes, after their parameters were cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_condensa.deploy.heads import FewerHeads

#: The parameters and buffers of one layer by name, as they were.
Shapes = Mapping[str, torch.Size]


def own_shapes(layer: nn.Module) -> dict[str, torch.Size]:
    """The shapes of a layer's own parameters and buffers."""
    own = {**layer._parameters, **layer._buffers}
    return {name: tensor.shape for name, tensor in own.items() if isinstance(tensor, Tensor)}


def correct_sizes(layer: nn.Module, before: Shapes) -> None:
    """Let the attributes of a layer of torch agree with its parameters.

    Args:
        layer: The layer, with its parameters as they are.
        before: Their shapes as the attributes have them.
    """
    after = own_shapes(layer)
    for kind, correct in _CORRECTIONS.items():
        if isinstance(layer, kind):
            correct(layer, before, after)
            return


def _linear(layer: nn.Linear, before: Shapes, after: Shapes) -> None:
    layer.out_features, layer.in_features = after["weight"]


def _convolution(layer: _ConvNd, before: Shapes, after: Shapes) -> None:
    shape = after["weight"]
    layer.groups = shape[0] * layer.groups // before["weight"][0] if layer.groups > 1 else 1
    sizes = [shape[0], shape[1] * layer.groups]
    if isinstance(layer, _ConvTransposeNd):
        layer.in_channels, layer.out_channels = sizes
    else:
        layer.out_channels, layer.in_channels = sizes


def _norm(layer: _NormBase, before: Shapes, after: Shapes) -> None:
    layer.num_features = next(iter(after.values()))[0]


def _prelu(layer: nn.PReLU, before: Shapes, after: Shapes) -> None:
    layer.num_parameters = after["weight"][0]


def _embedding(layer: nn.Embedding, before: Shapes, after: Shapes) -> None:
    layer.embedding_dim = after["weight"][1]


def _recurrent(layer: nn.RNNBase, before: Shapes, after: Shapes) -> None:
    layer.input_size = after["weight_ih_l0"][1]
    if not layer.proj_size:  # projected states are not cut
        layer.hidden_size = after["weight_hh_l0"][1]


def _attention(layer: nn.MultiheadAttention, before: Shapes, after: Shapes) -> None:
    cut = layer.out_proj.weight.shape[1] != layer.num_heads * layer.head_dim
    if cut and type(layer) is nn.MultiheadAttention:  # what computes for itself is left alone
        FewerHeads.adopt(layer)


def _encoder(layer: nn.TransformerEncoder, before: Shapes, after: Shapes) -> None:
    if any(isinstance(part, FewerHeads) for part in layer.modules()):
        layer.use_nested_tensor = False  # of which only the fused kernels know


_CORRECTIONS: Mapping[type[nn.Module], Callable[..., None]] = {
    nn.Linear: _linear,
    _ConvNd: _convolution,
    _NormBase: _norm,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
    nn.RNNBase: _recurrent,
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoder: _encoder,
}
