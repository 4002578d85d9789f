"""A layer with what follows it: the unit that is measured and exchanged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Epilogue:
    """What follows a product before anyone else sees it.

    Attributes:
        relu: Whether negative outputs become 0.
        pool: Side of the squares of which the largest output remains; 1 for none.
    """

    relu: bool = False
    pool: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it with torch."""
        x = functional.relu(x) if self.relu else x
        return functional.max_pool2d(x, self.pool) if self.pool > 1 else x


class DenseLayer(nn.Module):
    """A Conv2d or Linear layer with its epilogue, computed by torch.

    Args:
        layer: The layer; a following batch norm is folded into it.
        epilogue: What follows.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, epilogue: Epilogue) -> None:
        super().__init__()
        self.layer = layer
        self.epilogue = epilogue

    def forward(self, input: Tensor) -> Tensor:
        """The layer's outputs."""
        return self.epilogue(self.layer(input))


class SparseLayer(nn.Module, ABC):
    """The same outputs from non-zero weights alone; for inference, on the CPU, in float32.

    Weights are plain attributes, not parameters: nothing trains, moves or casts them.

    Args:
        dense: What it stands for.

    Attributes:
        dims: Of its inputs and outputs: 4 for a convolution, 2 for a linear layer, which takes all
            but the last as one.
    """

    def __init__(self, dense: DenseLayer) -> None:
        super().__init__()
        self.epilogue = dense.epilogue
        self.layer_name = str(dense.layer)
        layer = dense.layer
        self.dims = 4 if isinstance(layer, nn.Conv2d) else 2
        self._channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features

    def forward(self, input: Tensor) -> Tensor:
        """The layer's outputs.

        Raises:
            RuntimeError: If the input needs gradients.
            ValueError: If it is not float32 on the CPU, or has another number of channels.
        """
        x = input
        axis = 1 - self.dims
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a sparse layer gives no gradients: train the dense model instead")
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(
                f"a sparse layer takes float32 on the CPU, got {x.dtype} on {x.device}"
            )
        dims = (3, 4) if self.dims == 4 else range(1, x.dim() + 1)
        if x.dim() not in dims or x.shape[axis] != self._channels:
            raise ValueError(f"{self.layer_name} can't take an input of shape {tuple(x.shape)}")
        if self.dims == 4:
            return self._product(x) if x.dim() == 4 else self._product(x.unsqueeze(0)).squeeze(0)
        if x.dim() == 2:
            return self._product(x)
        y = self._product(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor:
        """The outputs.

        Args:
            x: Of shape (samples, channels, height, width), or (samples, features) for a linear
                layer.
        """

    def extra_repr(self) -> str:
        """What it computes."""
        return f"{self.layer_name}, {self.epilogue}"
