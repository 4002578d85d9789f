"""Physical removal: a smaller module that computes the same."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, combinations, islice
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from lightning_condensa.deploy.equality import DifferenceError, Equality
from lightning_condensa.deploy.plan import Plan, apply_plan, cut, cuts_of, make_cuts
from lightning_condensa.graph import ChannelGraph, Resize, removable, trace
from lightning_condensa.schemes import Encoded, Encoding
from lightning_condensa.schemes.attention import HEAD_COUNTS

#: How many choices of attributes are tried for modules of one class.
_MOST_TRIALS = 32

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Shrunk(Generic[M]):
    """What became of a module.

    Attributes:
        module: The smaller module.
        plan: How it was cut.
        stays: Weight → why it still has units that are zero.
    """

    module: M
    plan: dict[str, dict[int, list[int]] | int]
    stays: dict[str, str]


def shrink(module: M, example: Any) -> tuple[M, dict[str, dict[int, list[int]] | int]]:
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
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     net[0].weight[2:] = 0
        ...     net[0].bias[2:] = 0
        >>> smaller, plan = shrink(net, torch.zeros(1, 4))
        >>> smaller[2], plan["2.weight"]
        (Linear(in_features=2, out_features=2, bias=True), {1: [0, 1]})
    """
    result = shrunk(module, example)
    return result.module, result.plan


def shrunk(module: M, example: Any) -> Shrunk[M]:
    """As :func:`shrink`, with reasons for what stays."""
    named = [*module.named_parameters(), *module.named_buffers()]
    tensors = {n: t.detach().cpu() for n, t in named}
    graph = trace(module, example)
    equality = Equality(module, example)
    held = {g: r.reason for r in graph.resizes for g in r.groups.tolist() if g not in graph.pinned}
    gone = removable(graph, tensors, held)
    plan: dict[str, dict[int, list[int]] | int] = dict(make_cuts(graph, gone))
    try:
        smaller = _attempt(module, plan, equality)
    except Exception as error:  # the user's code may raise anything
        _warn(module, error)
        return Shrunk(deepcopy(module), {}, {})
    attributes: dict[str, Collection[str]] = {}
    for groups in _clusters(graph, held):
        released = {g: reason for g, reason in held.items() if g not in groups}
        wanted = removable(graph, tensors, released)
        resizes = [r for r in graph.resizes if bool(wanted[r.groups].any())]
        if not bool(wanted[list(groups)].any()):
            continue
        for chosen in _choices(module, _new_sizes(resizes, wanted), attributes):
            sizes = _sizes(module, _new_sizes(resizes, wanted), chosen)
            trial: dict[str, dict[int, list[int]] | int] = dict(make_cuts(graph, wanted))
            trial.update(sizes)
            try:
                smaller = _attempt(module, trial, equality)
            except Exception:  # of a guess, which the next one replaces
                continue
            held, gone, plan, attributes = released, wanted, trial, chosen
            break
    return Shrunk(smaller, plan, _stays(graph, tensors, gone, held))


def shrink_theta(theta: Mapping[str, Encoding], plan: Plan) -> dict[str, Encoding]:
    """θ of the smaller module.

    Where indices go along which a scale is shared by groups, and from a sum or a product, the
    values are stored decoded.
    """
    smaller, cuts = dict(theta), cuts_of(plan)
    for name in theta.keys() & cuts.keys():
        encoding, dims = theta[name], cuts[name]
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


def _attempt(module: M, plan: Plan, equality: Equality) -> M:
    """A copy of a module that is cut by a plan, and computes the same.

    Raises:
        Exception: Whatever the smaller module raises; ``ValueError`` if it computes something else.
    """
    smaller = deepcopy(module)
    if plan:
        apply_plan(smaller, plan)
        equality.check(smaller)
    return smaller


def _clusters(graph: ChannelGraph, held: Collection[int]) -> Iterator[set[int]]:
    """Held groups by the classes of the modules that spell out their sizes."""
    classes: dict[int, frozenset[str]] = {}
    for resize in graph.resizes:
        for group in set(resize.groups.tolist()) & set(held):
            classes[group] = classes.get(group, frozenset()) | {resize.layer}
    for kinds in dict.fromkeys(classes.values()):
        yield {group for group, of in classes.items() if of == kinds}


def _new_sizes(resizes: Collection[Resize], gone: Tensor) -> dict[str, dict[int, int]]:
    """Module → what becomes of sizes that its forward pass spells out."""
    sizes: dict[str, dict[int, set[int]]] = {}
    for resize in resizes:
        left = int((~gone[resize.groups]).sum())
        sizes.setdefault(resize.path, {}).setdefault(len(resize.groups), set()).add(left)
    return {
        path: {size: left.pop() for size, left in of.items() if len(left) == 1}
        for path, of in sizes.items()
    }


def _choices(
    module: nn.Module, sizes: Mapping[str, Mapping[int, int]], known: Mapping[str, Collection[str]]
) -> Iterator[dict[str, Collection[str]]]:
    """Which attributes may hold the sizes that modules spell out.

    First those that count heads by their names, with few others: what need not change should not,
    for a number may be something else and equal a size by chance. Layers of torch hold none: they
    are corrected by what they are.
    """
    holding: dict[str, list[str]] = {}
    for path in sizes.keys() - known.keys():
        owner = module.get_submodule(path)
        if not type(owner).__module__.startswith("torch."):
            numbers = {n: v for n, v in vars(owner).items() if type(v) is int}
            holding[path] = [n for n, v in numbers.items() if v in sizes[path]]
    names = list(dict.fromkeys(name for path in sorted(holding) for name in holding[path]))
    heads = set(names) & set(HEAD_COUNTS)
    others = [name for name in names if name not in heads]
    with_heads = (heads | set(some) for some in _subsets(others))
    without = (set(some) for some in _subsets(names) if not heads <= set(some))
    for subset in islice(chain(with_heads, without), _MOST_TRIALS):
        yield {**known, **{path: subset & set(own) for path, own in holding.items()}}


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Small ones first; one by one, as there may be very many."""
    return (some for n in range(len(names) + 1) for some in combinations(names, n))


def _sizes(
    module: nn.Module,
    sizes: Mapping[str, Mapping[int, int]],
    attributes: Mapping[str, Collection[str]],
) -> dict[str, int]:
    """The attributes with their new values, by name in the whole module."""
    found = {}
    for path, names in attributes.items():
        owner = module.get_submodule(path)
        for name in sorted(names):
            found[f"{path}.{name}" if path else name] = sizes[path].get(
                getattr(owner, name), getattr(owner, name)
            )
    return found


def _stays(
    graph: ChannelGraph, tensors: Mapping[str, Tensor], gone: Tensor, held: Mapping[int, str]
) -> dict[str, str]:
    """Why units that are zero were not taken out."""
    notes: dict[str, str] = {}
    for product in graph.products:
        silent = ~product.connected(tensors[product.weight]).any(2).flatten()
        if product.bias is not None:
            silent &= tensors[product.bias] == 0
        groups = graph.groups[product.outputs]
        left = groups[silent & ~gone[groups]].tolist()
        if left:
            reasons = (graph.pinned.get(g) or held.get(g) or _TIED for g in left)
            why = "; ".join(dict.fromkeys(reasons))
            notes[product.weight] = f"{len(left)} of {len(groups)} units are zero and stay: {why}"
    return notes


#: Of units that nothing pins.
_TIED = "they go with others that are not zero, or one has to be left"


def _warn(module: nn.Module, reason: Exception) -> None:
    said = (
        str(reason)
        if isinstance(reason, DifferenceError)
        else f"the smaller module fails with {type(reason).__name__}: {reason}"
    )
    warnings.warn(
        f"{type(module).__name__} was not made smaller: {said}", UserWarning, stacklevel=4
    )
