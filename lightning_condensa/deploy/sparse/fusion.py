"""Find the layers that can be exchanged with what follows them, and join those in a row."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_condensa.deploy.sparse.direct import DirectLayer
from lightning_condensa.deploy.sparse.layers import DenseLayer, Epilogue

_RELUS = (torch.relu, functional.relu, "relu")


def gather_layers(module: nn.Module, *, trace: bool) -> nn.Module:
    """Put every Conv2d and Linear layer, with what can join it, into a `DenseLayer`.

    What `torch.fx` can trace becomes a graph, in which a layer takes in the batch norm, ReLU and
    max pooling that alone use its output. Where it can't, the same is tried with each child, and
    what is a layer is wrapped alone. What stands inside a module of torch's own, such as the
    projections of `nn.MultiheadAttention`, stays: it is read there, not called.

    Args:
        module: In evaluation mode; changed in place.
        trace: Whether to trace at all.

    Returns:
        The module, or what takes its place. Names of layers stay as they were.
    """
    if _is_layer(module):
        return DenseLayer(module, Epilogue())  # type: ignore[arg-type]
    if fx.Tracer().is_leaf_module(module, "") and not isinstance(module, nn.ModuleList):
        return module
    if trace:
        try:
            traced = fx.symbolic_trace(module)
        except Exception:  # whatever the user's code does with a proxy
            pass
        else:
            _gather_in(traced)
            return traced
    for name, child in list(module.named_children()):
        setattr(module, name, gather_layers(child, trace=trace))
    return module


def join_layers(module: nn.Module) -> dict[str, list[str]]:
    """Make one of layers on the kernel that follow each other in what was traced, in place.

    Returns:
        Names of the layers in each one that stands for several, by its own: that of the first.
    """
    found: dict[str, list[str]] = {}
    for name, part in list(module.named_modules()):
        if isinstance(part, fx.GraphModule):
            prefix = f"{name}." if name else ""
            found |= {prefix + names[0]: [prefix + n for n in names] for names in _join_in(part)}
    return found


def _join_in(traced: fx.GraphModule) -> list[list[str]]:
    rows = []
    called = Counter(node.target for node in traced.graph.nodes)
    for node in traced.graph.nodes:  # without those that are dropped meanwhile
        first = _module(traced, node)
        if called[node.target] > 1 or not isinstance(first, DirectLayer):
            continue
        names = [str(node.target)]
        while (following := _next(node)) is not None and called[following.target] == 1:
            second = _module(traced, following)
            if not isinstance(second, DirectLayer) or second.dims != first.dims:
                break
            first = first.then(second)
            names.append(str(following.target))
            _drop_next(node)
        if len(names) > 1:
            traced.set_submodule(names[0], first)
            rows.append(names)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return rows


def _is_layer(module: nn.Module | None) -> bool:
    """Subclasses may do anything, and so may hooks."""
    return type(module) in (nn.Conv2d, nn.Linear) and not _has_hooks(module)


def _has_hooks(module: nn.Module | None) -> bool:
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def _gather_in(traced: fx.GraphModule) -> None:
    calls: dict[str, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    read = tuple(str(n.target) for n in traced.graph.nodes if n.op == "get_attr")
    for name, nodes in calls.items():
        layer = traced.get_submodule(name)
        if not _is_layer(layer) or any(target.startswith(f"{name}.") for target in read):
            continue
        epilogue = Epilogue()
        if len(nodes) == 1:
            layer, epilogue = _take_in(traced, nodes[0], layer)
        traced.set_submodule(name, DenseLayer(layer, epilogue))  # type: ignore[arg-type]
    traced.delete_all_unused_submodules()
    traced.recompile()


def _take_in(traced: fx.GraphModule, call: fx.Node, layer: nn.Module) -> tuple[nn.Module, Epilogue]:
    """Remove what follows a layer from the graph, as far as the layer can do it."""
    convolution = isinstance(layer, nn.Conv2d)
    norm = _module(traced, _next(call))
    if convolution and type(norm) is nn.BatchNorm2d and _is_foldable(norm):
        layer = fuse_conv_bn_eval(layer, norm)  # type: ignore[type-var]
        _drop_next(call)
    relu = _is_relu(traced, _next(call))
    if relu:
        _drop_next(call)
    pool = _pool_side(traced, _next(call)) if convolution else 1
    if pool > 1:
        _drop_next(call)
    return layer, Epilogue(relu, pool)


def _is_foldable(norm: nn.BatchNorm2d) -> bool:
    """One without running statistics takes those of the batch even in evaluation mode."""
    return norm.running_mean is not None and not _has_hooks(norm)


def _next(node: fx.Node) -> fx.Node | None:
    """The only node that uses this one, if it does so once, as its first argument."""
    users = list(node.users)
    alone = len(users) == 1 and users[0].args[:1] == (node,)
    return users[0] if alone and users[0].all_input_nodes == [node] else None


def _drop_next(node: fx.Node) -> None:
    following = _next(node)
    assert following is not None
    following.replace_all_uses_with(node)
    node.graph.erase_node(following)


def _module(traced: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    if node is None or node.op != "call_module" or node.kwargs:
        return None
    return traced.get_submodule(str(node.target))


def _is_relu(traced: fx.GraphModule, node: fx.Node | None) -> bool:
    module = _module(traced, node)
    if module is not None:
        return type(module) is nn.ReLU and not _has_hooks(module)
    return node is not None and node.op != "call_module" and node.target in _RELUS


def _pool_side(traced: fx.GraphModule, node: fx.Node | None) -> int:
    """Side of the squares of a max pooling that leaves none out twice; 1 for anything else."""
    module = _module(traced, node)
    if type(module) is nn.MaxPool2d and not _has_hooks(module):
        plain = (module.padding, module.dilation, module.ceil_mode, module.return_indices)
        if plain in (((0, 1, False, False)), ((0, 0), (1, 1), False, False)):
            return _square(module.kernel_size, module.stride)
    if node is not None and node.op == "call_function" and node.target is functional.max_pool2d:
        given: dict[str, Any] = dict(zip(("kernel_size", "stride"), node.args[1:3], strict=False))
        given |= node.kwargs
        defaults = {"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
        if len(node.args) <= 3 and all(given.get(k, v) == v for k, v in defaults.items()):
            return _square(given.get("kernel_size"), given.get("stride"))
    return 1


def _square(size: Any, stride: Any) -> int:
    stride = size if stride is None else stride
    sides = {*(size if isinstance(size, tuple) else (size,))}
    sides |= {*(stride if isinstance(stride, tuple) else (stride,))}
    side = sides.pop()
    return side if not sides and isinstance(side, int) else 1
