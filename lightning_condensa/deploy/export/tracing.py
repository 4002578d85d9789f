"""One traced graph of a module's forward, with any batch size."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from lightning_condensa.graph import evaluating


def trace(module: nn.Module, example: Any) -> ExportedProgram:
    """The forward of a module in evaluation mode; the module is left as it was.

    Args:
        module: The module.
        example: See :func:`inputs_of`. Its values don't matter.

    Returns:
        The program. Dimension 0 is dynamic in every input in which it is as long as in the first.

    Raises:
        ValueError: If ``example`` is nothing of the kind.
        torch._dynamo.exc.UserError: If forward cannot be traced, or fixes the batch size.

    Example:
        >>> program = trace(nn.Linear(3, 2), torch.zeros(1, 3))
        >>> program.module()(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    module = eager(module)
    home = next((t.device for t in module.state_dict().values()), torch.device("cpu"))
    inputs = tuple(i.to(home) for i in inputs_of(example))
    batch = inputs[0].shape[0]
    batched = [i.dim() > 0 and i.shape[0] == batch for i in inputs]
    if batch == 1:  # torch.export would take one for a constant
        inputs = tuple(
            torch.cat([i, i]) if dynamic else i for i, dynamic in zip(inputs, batched, strict=True)
        )
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]  # fits every signature
    for tensor, dynamic in zip(inputs, batched, strict=True):
        if dynamic:
            shapes[tensor] = {0: Dim("batch")}
    # With gradients: modules such as TransformerEncoder take shortcuts without.
    with torch.inference_mode(False), torch.enable_grad(), evaluating(module):
        return torch.export.export(module, inputs, dynamic_shapes=shapes)


def eager(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wraps, if it does."""
    wrapped: nn.Module = getattr(module, "_orig_mod", module)
    return wrapped


def inputs_of(example: Any) -> tuple[Tensor, ...]:
    """The positional inputs of forward.

    Args:
        example: A batch, or a tuple of positional inputs: tensors, the first with the batch in
            dimension 0.

    Raises:
        ValueError: If it is something else.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(i, Tensor) for i in inputs):
        got = [type(i).__name__ for i in inputs] if isinstance(example, tuple) else type(example)
        raise ValueError(f"example must be a tensor or a tuple of tensors, got {got}")
    if inputs[0].dim() == 0 or inputs[0].shape[0] == 0:
        raise ValueError(
            "example must hold a batch in dimension 0 of its first tensor, "
            f"got shape {tuple(inputs[0].shape)}"
        )
    return inputs


def program_bytes(program: ExportedProgram) -> bytes:
    """The ``.pt2`` archive of a program, without the example inputs.

    The inputs are left out because they are the one pickle in the archive, and the user's data.
    """
    program.example_inputs = None
    buffer = BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()
