"""What the modules of a model get when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

#: What a layer got and gave.
Call = tuple[Tensor, Tensor]


def record_calls(
    layers: Mapping[str, nn.Module], module: nn.Module, inputs: tuple[Any, ...]
) -> dict[str, Call]:
    """The first call of each layer that is called.

    Args:
        layers: Of the module, by name; each takes one input and gives one output.
        module: Called once.
        inputs: Its positional inputs.
    """
    calls: dict[str, Call] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            calls.setdefault(name, (args[0] if args else kwargs["input"], output))

        return hook

    handles = [
        layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in layers.items()
    ]
    module(*inputs)
    for handle in handles:
        handle.remove()
    return calls


def called_modules(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, set[str]]:
    """The outputs of a module, and the names of all modules that are called meanwhile."""
    called: set[str] = set()

    def note(name: str) -> Any:
        return lambda *_: called.add(name)

    handles = [m.register_forward_pre_hook(note(n)) for n, m in module.named_modules()]
    outputs = module(*inputs)
    for handle in handles:
        handle.remove()
    return outputs, called
