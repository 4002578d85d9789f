"""Which parameters of a module a scheme compresses, and why not the others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter

LINEAR_TYPES = ("Linear",)
CONV_TYPES = (
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
)
RECURRENT_TYPES = ("RNNBase", "RNNCellBase")
ATTENTION_TYPES = ("MultiheadAttention",)
NORM_TYPES = ("_NormBase", "GroupNorm", "LayerNorm", "RMSNorm")
WEIGHT_TYPES = LINEAR_TYPES + CONV_TYPES + RECURRENT_TYPES + ATTENTION_TYPES


class SelectionError(ValueError):
    """A scheme selects nothing, or something it cannot compress."""


@dataclass(frozen=True)
class Target:
    """One selected weight.

    Attributes:
        name: Its name in ``module.named_parameters()``.
        shape: Its shape.
        layer: Class name of the layer that owns it.
        bias: Name of the bias of the same layer, if there is one.
        transposed: Whether the layout is that of a transposed convolution.
        groups: Groups of the convolution.
    """

    name: str
    shape: tuple[int, ...]
    layer: str
    bias: str | None = None
    transposed: bool = False
    groups: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, as a member of a pool."""
        return (self.name,)

    @property
    def channel_dim(self) -> int:
        """The dimension of output channels."""
        return 1 if self.transposed else 0


@dataclass(frozen=True)
class Skipped:
    """A parameter that a scheme leaves alone, and the reason."""

    name: str
    reason: str


def select(
    module: nn.Module,
    types: Sequence[str],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[Target]:
    """The weights that a scheme compresses, in the module's order, shared ones once.

    Args:
        module: The network.
        types: Class names of layers, matched against each layer's class and its bases.
        include: Regular expressions; where given, a parameter's name must match one
            (``re.search``).
        exclude: Regular expressions; a parameter whose name matches one is left alone.

    Raises:
        SelectionError: If nothing is left, if a pattern matches no candidate, or if a layer
            is lazy and has not been run yet.
    """
    targets = [t for t, reason in _judge(module, types, include, exclude) if reason is None]
    candidates = [t.name for t, reason in _judge(module, types, (), ()) if reason is None]
    require_matches(candidates, include, exclude)
    if not targets:
        raise SelectionError(
            f"the scheme selects no weight of {type(module).__name__}: types={tuple(types)}, "
            f"include={tuple(include)}, exclude={tuple(exclude)}; "
            f"weights of these types: {shorten(candidates)}"
        )
    return targets


def skipped(
    module: nn.Module,
    types: Sequence[str],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[Skipped]:
    """The parameters that :func:`select` leaves alone, each with its reason."""
    judged = _judge(module, types, include, exclude)
    return [Skipped(t.name, reason) for t, reason in judged if reason is not None]


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer normalizes, by its class and bases."""
    return not {base.__name__ for base in type(layer).__mro__}.isdisjoint(NORM_TYPES)


def check_pattern(argument: str, pattern: str) -> None:
    """Raise ``ValueError`` unless ``pattern`` is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{argument} must hold regular expressions, got {pattern!r} ({error})"
        ) from error


def require_matches(
    candidates: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> None:
    """Raise :class:`SelectionError` if a pattern matches none of the candidates' names."""
    for kind, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in candidates):
                raise SelectionError(
                    f"{kind}={pattern!r} matches no weight; there are {shorten(candidates)}"
                )


def unwanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why patterns leave a parameter out; ``None`` where they do not."""
    if include and not any(re.search(p, name) for p in include):
        return "matches no include pattern"
    matched = next((p for p in exclude if re.search(p, name)), None)
    return None if matched is None else f"excluded by {matched!r}"


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """The first names, and how many there are."""
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"


def _judge(
    module: nn.Module, types: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> Iterator[tuple[Target, str | None]]:
    seen: set[int] = set()
    for prefix, layer in module.named_modules():
        bases = {base.__name__ for base in type(layer).__mro__}
        for local, parameter in layer.named_parameters(prefix=prefix, recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(parameter, UninitializedParameter):
                raise SelectionError(
                    f"{local} is not initialized yet: run one batch through the lazy module first"
                )
            reason: str | None = None
            if bases.isdisjoint(types):
                reason = f"layer type {type(layer).__name__} is not selected"
            elif local.rpartition(".")[2].startswith("bias"):  # MultiheadAttention.bias_k has 3
                reason = "a bias"
            elif parameter.dim() < 2:
                reason = "not a weight matrix (fewer than two dimensions)"
            elif not parameter.is_floating_point():
                reason = f"of type {parameter.dtype}"
            else:
                reason = unwanted(local, include, exclude)
            bias = getattr(layer, "bias", None)
            owns_bias = isinstance(bias, nn.Parameter) and local.endswith("weight")
            groups = getattr(layer, "groups", 1)
            yield (
                Target(
                    name=local,
                    shape=tuple(parameter.shape),
                    layer=type(layer).__name__,
                    bias=local.removesuffix("weight") + "bias" if owns_bias else None,
                    transposed=bool(getattr(layer, "transposed", False)),
                    groups=groups if isinstance(groups, int) else 1,
                ),
                reason,
            )
