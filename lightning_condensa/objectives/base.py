"""What the search maximizes or minimizes: a number about a compressed model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lightning_condensa.deploy import CompressedModel

Direction = Literal["min", "max"]


class Objective(ABC):
    """A figure of a compressed model that needs no training data and no labels.

    The search evaluates it on untrained, merely projected copies to know it before a trial runs,
    and on the finished model for the result.
    """

    #: Whether less (``"min"``) or more (``"max"``) is better.
    direction: ClassVar[Direction] = "min"
    #: Unit for people, such as ``"bytes"``.
    unit: ClassVar[str] = ""

    @abstractmethod
    def __call__(self, compressed: CompressedModel) -> float:
        """The figure."""

    def details(self, compressed: CompressedModel) -> dict[str, Any]:
        """The figure with what is needed to interpret it, as plain data."""
        return {"value": self(compressed)}

    def beside(self, dense: nn.Module, values: Mapping[str, float]) -> Objective:
        """The same objective, told what it is for the uncompressed module.

        One that is measured takes turns with that module, so that two values compare although the
        machine was busier, or another one, when the second was taken. A count is as it is.

        Args:
            dense: The uncompressed module.
            values: Its objectives by name, this one's among them.
        """
        return self

    @property
    def name(self) -> str:
        """Name for tables and logs."""
        return type(self).__name__


class CallableObjective(Objective):
    """A user's function as an objective.

    Args:
        function: From a compressed model to a finite number.
        direction: Whether less or more is better.
    """

    def __init__(self, function: Callable[[CompressedModel], float], direction: Direction) -> None:
        self.function = function
        self.direction = direction  # type: ignore[misc]

    def __call__(self, compressed: CompressedModel) -> float:
        """Call the function.

        Raises:
            ValueError: If it does not return a finite number.
        """
        value = self.function(compressed)
        if not isinstance(value, int | float | torch.Tensor) or not math.isfinite(float(value)):
            raise ValueError(f"objective {self.name} must return a finite number, got {value!r}")
        return float(value)

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)


def example_of(module: nn.Module, example: Any, objective: str) -> tuple[Any, ...]:
    """The positional inputs to run ``module`` with: those given, else its own example.

    Raises:
        ValueError: If there are none.
    """
    found = getattr(module, "example_input_array", None) if example is None else example
    if found is None:
        raise ValueError(
            f"{objective} must run the model: pass {objective}(example=...) with an input batch, "
            "or set example_input_array on the module"
        )
    return found if isinstance(found, tuple) else (found,)
