"""How channels come about, and when one is zero for every input.

A *channel* is a number that stands for a slice of activations: whatever one output unit of a layer
computes. Each operator that makes new channels leaves one definition behind, in the order of
computation, so that what is true of channels can be worked out in one pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

#: The channels that are zero whenever a channel is; ``None`` where nothing makes it zero.
Origins = frozenset[int] | None


class Reads(NamedTuple):
    """Which inputs the outputs of an operator depend on.

    Attributes:
        inputs: Channels, shape ``(groups, inputs)``.
        outputs: Channels, shape ``(groups, outputs)``.
        connected: Boolean, shape ``(groups, outputs, inputs)``.
    """

    inputs: Tensor
    outputs: Tensor
    connected: Tensor


@dataclass(frozen=True)
class Removal:
    """What goes where output units are removed.

    Attributes:
        producers: The weights whose units can be removed, and whether their biases go along.
        norms: Whether γ and β of the norms that follow go along.
    """

    producers: Mapping[str, bool]
    norms: bool = True


@dataclass(frozen=True, eq=False)
class Definition(ABC):
    """Channels that one operator makes.

    Attributes:
        outputs: The channels, shape ``(n,)``.
    """

    outputs: Tensor

    @abstractmethod
    def zeros(self, zero: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Which of the outputs are zero for every input.

        Args:
            zero: Which of all earlier channels are, boolean.
            tensors: Parameters and buffers by name.
        """

    def reads(self, zero: Tensor, tensors: Mapping[str, Tensor]) -> list[Reads]:
        """Which inputs each output depends on, where those are groups of their own.

        Args:
            zero: Which of all channels are zero for every input, boolean.
            tensors: Parameters and buffers by name.
        """
        return []

    @abstractmethod
    def origins(self, origins: Sequence[Origins], removal: Removal) -> list[Origins]:
        """Output units of layers that make each of the outputs zero when all of them are removed.

        Args:
            origins: Those of all earlier channels.
            removal: What can be removed.
        """


@dataclass(frozen=True, eq=False)
class Product(Definition):
    """Output units of a linear layer or a convolution.

    Attributes:
        weight: Its name.
        bias: Its name, if there is one.
        inputs: The channel at each input of each group, shape ``(groups, inputs / groups)``.
        transposed: Whether the weight is laid out ``(inputs, outputs / groups, *kernel)``.
    """

    weight: str
    bias: str | None
    inputs: Tensor
    transposed: bool = False

    def connected(self, weight: Tensor) -> Tensor:
        """Which inputs each output reads, shape ``(groups, outputs / groups, inputs / groups)``."""
        groups = len(self.inputs)
        used = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
        used = used.view(groups, -1, used.shape[1])
        return used.transpose(1, 2) if self.transposed else used

    def zeros(self, zero: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Units that read nothing but zeros, and have no bias."""
        reads = self.connected(tensors[self.weight]) & ~zero[self.inputs][:, None]
        silent = ~reads.any(2).flatten()
        return silent if self.bias is None else silent & (tensors[self.bias] == 0)

    def reads(self, zero: Tensor, tensors: Mapping[str, Tensor]) -> list[Reads]:
        """Inputs that are not zero, through weights that are not zero."""
        connected = self.connected(tensors[self.weight]) & ~zero[self.inputs][:, None]
        return [Reads(self.inputs, self.outputs.view(len(self.inputs), -1), connected)]

    def origins(self, origins: Sequence[Origins], removal: Removal) -> list[Origins]:
        """The units themselves."""
        with_bias = removal.producers.get(self.weight)
        removable = with_bias or (with_bias is not None and self.bias is None)
        return [frozenset((c,)) if removable else None for c in self.outputs.tolist()]


@dataclass(frozen=True, eq=False)
class Norm(Definition):
    """Channels after normalization.

    Attributes:
        inputs: The channels before, as many as there are outputs.
        weight: Name of γ, if there is one.
        bias: Name of β, if there is one.
        mean: Name of the running mean, where one is subtracted.
        joint: Whether several channels share statistics: then a zero does not stay zero.
    """

    inputs: Tensor
    weight: str | None
    bias: str | None
    mean: str | None = None
    joint: bool = False

    def zeros(self, zero: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Where γ and β are zero, or zeros are mapped to zero."""
        nothing = torch.zeros(len(self.outputs), dtype=torch.bool, device=zero.device)
        no_bias = ~nothing if self.bias is None else tensors[self.bias] == 0
        no_weight = nothing if self.weight is None else tensors[self.weight] == 0
        if self.joint:
            return no_weight & no_bias
        no_mean = ~nothing if self.mean is None else tensors[self.mean] == 0
        return no_bias & (no_weight | (zero[self.inputs] & no_mean))

    def origins(self, origins: Sequence[Origins], removal: Removal) -> list[Origins]:
        """Those before, where γ and β go with them, or zeros stay zeros anyway."""
        zeroed = removal.norms and self.weight is not None
        stays = not self.joint and self.mean is None and self.bias is None
        if not zeroed and not stays:
            return [None] * len(self.outputs)
        return [origins[c] for c in self.inputs.tolist()]


@dataclass(frozen=True, eq=False)
class Elementwise(Definition):
    """Channels combined element by element.

    Attributes:
        inputs: The channels that are combined, shape ``(operands, n)``.
        zero_if: Of how many operands zeros are needed for a zero: of ``"all"`` (a sum), ``"any"``
            (a product), or of the ``"first"`` (a quotient).
    """

    inputs: Tensor
    zero_if: Literal["all", "any", "first"]

    def zeros(self, zero: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Zeros combined."""
        operands = zero[self.inputs]
        if self.zero_if == "all":
            return operands.all(0)
        return operands.any(0) if self.zero_if == "any" else operands[0]

    def origins(self, origins: Sequence[Origins], removal: Removal) -> list[Origins]:
        """The union of a sum; of a product those of the first operand that has some."""
        combined: list[Origins] = []
        for column in self.inputs.t().tolist():
            each = [origins[c] for c in column]
            known = [o for o in each if o is not None]
            if self.zero_if == "all":
                combined.append(frozenset().union(*known) if len(known) == len(each) else None)
            elif self.zero_if == "any":
                combined.append(known[0] if known else None)
            else:
                combined.append(each[0])
        return combined


@dataclass(frozen=True, eq=False)
class Values(Definition):
    """Elements or columns of a parameter or buffer that is used as an activation.

    Attributes:
        name: Its name.
        shape: Its shape.
        dim: The dimension of channels; ``None`` where each element is one.
    """

    name: str
    shape: torch.Size
    dim: int | None = None

    def zeros(self, zero: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Where it is zero."""
        empty = tensors[self.name] == 0
        return empty.flatten() if self.dim is None else empty.movedim(self.dim, 0).flatten(1).all(1)

    def origins(self, origins: Sequence[Origins], removal: Removal) -> list[Origins]:
        """None: nothing zeroes it."""
        return [None] * len(self.outputs)
