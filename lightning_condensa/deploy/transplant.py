"""Optimizer state of a module, for its smaller copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_condensa.deploy.plan import Plan, cut, cuts_of


@torch.no_grad()
def transplant_optimizer(
    source: Optimizer, module: nn.Module, target: Optimizer, smaller: nn.Module, plan: Plan
) -> None:
    """Carry the state of an optimizer over to that of a smaller module.

    Training goes on as the whole module's would with what was removed held at zero: momentum,
    moments and whatever else an optimizer keeps in the shape of a parameter lose the indices that
    the parameter lost; step counts and the like are copied. Settings (learning rates, betas) are
    those of ``target``.

    Parameters go by name: those of ``smaller`` that ``target`` trains get what ``source`` has for
    the parameter of that name in ``module``. One that ``source`` does not train, or has not stepped
    yet, starts without state.

    Args:
        source: The optimizer of ``module``; left as it is.
        module: The module before.
        target: The optimizer of ``smaller``, of the same class; its state is replaced.
        smaller: What :meth:`~lightning_condensa.CompressedModel.shrink` made of ``module``.
        plan: What it kept: :attr:`~lightning_condensa.CompressedModel.plan`.

    Raises:
        ValueError: If the optimizers are of different classes, or ``target`` trains a parameter
            that is not in ``smaller``, or whose shape is not what the plan makes of that in
            ``module``, or a state cannot be cut: it has a shape of its own, as in Adafactor.

    Example:
        >>> from lightning_condensa import CompressedModel, NeuronPrune
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net.example_input_array = torch.zeros(1, 4)
        >>> compressed = CompressedModel.compress(net, NeuronPrune(0.25, coupled=True))
        >>> adam = torch.optim.Adam(compressed.module.parameters())
        >>> compressed.module(torch.ones(1, 4)).sum().backward()
        >>> adam.step()
        >>> smaller = compressed.shrink()
        >>> other = torch.optim.Adam(smaller.module.parameters())
        >>> transplant_optimizer(adam, compressed.module, other, smaller.module, smaller.plan)
        >>> other.state[smaller.module[0].weight]["exp_avg"].shape
        torch.Size([2, 4])
    """
    if type(source) is not type(target):
        raise ValueError(
            f"target must be a {type(source).__name__} as source is, got {type(target).__name__}"
        )
    before = dict(module.named_parameters(remove_duplicate=False))
    names = {id(p): name for name, p in smaller.named_parameters(remove_duplicate=False)}
    cuts = {id(before[name]): dims for name, dims in cuts_of(plan).items() if name in before}
    state: dict[Tensor, dict[str, Any]] = {}
    for parameter in (p for group in target.param_groups for p in group["params"]):
        name = names.get(id(parameter))
        if name not in before:
            raise ValueError(
                "target must train parameters that both modules have; it trains "
                + (f"{name}, which module lacks" if name else "one that smaller lacks")
            )
        whole = before[name]
        dims = cuts.get(id(whole), {})
        if cut(whole, dims).shape != parameter.shape:
            raise ValueError(
                f"plan makes {tuple(cut(whole, dims).shape)} of {name}, which smaller has as "
                f"{tuple(parameter.shape)}: pass the plan by which it was cut"
            )
        for key, value in source.state.get(whole, {}).items():
            carried = value
            if isinstance(value, Tensor):
                if dims and value.dim() and value.shape != whole.shape:
                    raise ValueError(
                        f"{key} of {name} has the shape {tuple(value.shape)}, the parameter "
                        f"{tuple(whole.shape)}: {type(source).__name__} cannot be cut"
                    )
                carried = cut(value, dims if value.shape == whole.shape else {}).clone()
            state.setdefault(parameter, {})[key] = carried
    target.state.clear()
    target.state.update(state)
