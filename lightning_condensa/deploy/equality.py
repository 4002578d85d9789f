"""Whether a smaller module computes the same as the whole."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_condensa.graph import example_arguments

#: Of sums in double precision in another order.
_ROUNDING = 1e-10


class DifferenceError(ValueError):
    """Outputs of two modules differ."""


class Equality:
    """Compares modules with one in double precision, on an example and on it with noise.

    Args:
        module: The module that others are compared with.
        example: An input in Lightning's ``example_input_array`` convention.
        tolerance: Largest difference, relative to the largest output.
    """

    def __init__(self, module: nn.Module, example: Any, tolerance: float = _ROUNDING) -> None:
        self._tolerance = tolerance
        self._inputs = (example, pytree.tree_map_only(Tensor, _with_noise, example))
        self._module = module
        self._expected: list[list[Tensor]] | None = None

    @torch.no_grad()
    def check(self, other: nn.Module) -> None:
        """Run a module and compare its outputs.

        Raises:
            DifferenceError: If they differ by more than rounding.
            Exception: Whatever the module raises.
        """
        found = [_outputs(other, inputs) for inputs in self._inputs]
        if self._expected is None:
            self._expected = [_outputs(self._module, inputs) for inputs in self._inputs]
        difference = max(map(_difference, found, self._expected))
        if not difference <= self._tolerance:
            raise DifferenceError(f"outputs would differ by {difference:.1e}")


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest output; infinite where it is no number."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        same = torch.isclose(a, b, rtol=0, atol=0, equal_nan=True)
        error = torch.where(same, 0, (a - b).abs()).nan_to_num(float("inf"))
        if error.numel():
            size = b.abs().nan_to_num(0, 0, 0).max().clamp(min=1e-30)
            worst = max(worst, float(error.max() / size))
    return worst


def _outputs(module: nn.Module, example: Any) -> list[Tensor]:
    double = deepcopy(module).to(dtype=torch.float64).eval()
    device = next(module.parameters()).device

    def convert(tensor: Tensor) -> Tensor:
        wide = tensor.double() if tensor.is_floating_point() else tensor
        return wide.to(device)

    args, kwargs = pytree.tree_map_only(Tensor, convert, example_arguments(example))
    leaves = pytree.tree_leaves(double(*args, **kwargs))
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor)]


def _with_noise(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return tensor + noise.to(tensor)
