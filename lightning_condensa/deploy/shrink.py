"""Physical removal: a smaller module that computes the same."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_condensa.deploy.plan import Plan, apply_plan, cut, make_plan
from lightning_condensa.graph import example_arguments, trace
from lightning_condensa.schemes import Encoded, Encoding

#: Largest difference of outputs in double precision, relative to the largest output.
_TOLERANCE = 1e-10

M = TypeVar("M", bound=nn.Module)


def shrink(module: M, example: Any) -> tuple[M, dict[str, dict[int, list[int]]]]:
    """A copy of a module without the channels that no output depends on.

    A channel goes when all that reads it sees a zero, or ignores it; what ties channels together
    (sums, depthwise convolutions) decides which have to go together. Outputs of the network,
    channels that share a layer norm, and what passes through operators that are not known stay. At
    least one channel of each kind is left.

    The result is verified: both modules run in double precision on the example, and on the example
    with noise. Where they differ or the smaller one fails, for its code spells out a size say,
    nothing is removed, and a warning says why.

    Args:
        module: The module; left as it is.
        example: An input in Lightning's ``example_input_array`` convention.

    Returns:
        The copy, and the plan: parameter → dimension → kept indices.

    Raises:
        TraceError: If the module cannot be traced on the example.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     net[0].weight[2:] = 0
        ...     net[0].bias[2:] = 0
        >>> smaller, plan = shrink(net, torch.zeros(1, 4))
        >>> smaller[2], plan["2.weight"]
        (Linear(in_features=2, out_features=2, bias=True), {1: [0, 1]})
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    plan = make_plan(trace(module, example), {n: t.detach().cpu() for n, t in named})
    smaller = deepcopy(module)
    if not plan:
        return smaller, {}
    try:
        apply_plan(smaller, plan)
        difference = _difference(module, smaller, example)
    except Exception as error:  # the user's code may raise anything
        _warn(module, f"the smaller module fails with {type(error).__name__}: {error}")
        return deepcopy(module), {}
    if not difference <= _TOLERANCE:
        _warn(module, f"outputs would differ by {difference:.1e}")
        return deepcopy(module), {}
    return smaller, plan


def shrink_theta(theta: Mapping[str, Encoding], plan: Plan) -> dict[str, Encoding]:
    """θ of the smaller module.

    Where indices go along which a scale is shared by groups, and from a sum or a product, the
    values are stored decoded.
    """
    smaller = dict(theta)
    for name in theta.keys() & plan.keys():
        encoding, dims = theta[name], plan[name]
        mask = None if encoding.mask is None else cut(encoding.mask, dims)
        if isinstance(encoding, Encoded) and encoding.group is None:
            encoded = encoding
        else:
            encoded = Encoded.dense(encoding.decode())
        scale = encoded.scale
        if scale is not None:
            scale = cut(scale, {d: kept for d, kept in dims.items() if scale.shape[d] > 1})
        smaller[name] = encoded.replace(codes=cut(encoded.codes, dims), mask=mask, scale=scale)
    return smaller


@torch.no_grad()
def _difference(module: nn.Module, smaller: nn.Module, example: Any) -> float:
    """Largest difference of two modules' outputs, relative to the largest output."""
    worst = 0.0
    for inputs in (example, pytree.tree_map_only(Tensor, _with_noise, example)):
        ours, theirs = (_outputs(m, inputs) for m in (smaller, module))
        for a, b in zip(ours, theirs, strict=True):
            same = torch.isclose(a, b, rtol=0, atol=0, equal_nan=True)
            error = torch.where(same, 0, (a - b).abs())
            size = b.abs().nan_to_num(0, 0, 0).max() if b.numel() else torch.zeros(())
            worst = max(worst, float(error.max() / size.clamp(min=1e-30)) if a.numel() else 0.0)
            if bool(error.isnan().any()):
                return float("nan")
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


def _warn(module: nn.Module, reason: str) -> None:
    warnings.warn(
        f"{type(module).__name__} was not made smaller: {reason}", UserWarning, stacklevel=3
    )
