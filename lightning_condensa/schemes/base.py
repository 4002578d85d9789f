"""The scheme interface: Condensa's Π and Δ over named tensors.

A scheme is *what to compress and how*: an immutable value that can be compared, searched over and
written to YAML. Bound to a module (:meth:`Scheme.bind`) it becomes a pair of pure functions,
Π: weights → θ and Δ: θ → weights, on which everything else is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import yaml
from torch import Tensor, nn

from lightning_condensa.functional.placement import where
from lightning_condensa.graph import ChannelGraph
from lightning_condensa.schemes.bound import PROJECT, PRUNE, QUANTIZE, BoundScheme
from lightning_condensa.schemes.config import changed_fields, decode, encode
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.encoding import Encoding
from lightning_condensa.schemes.finite import require_finite
from lightning_condensa.schemes.selection import (
    WEIGHT_TYPES,
    Skipped,
    Target,
    check_pattern,
    select,
    skipped,
)
from lightning_condensa.schemes.space import Dimension, is_dimension

S = TypeVar("S", bound="Scheme")


@dataclass(frozen=True)
class Scheme:
    """Selector × view × projection (Condensa's scheme, arXiv:1911.02497 §3).

    To write your own, subclass as a frozen dataclass and define :meth:`project`:

    Example:
        >>> import torch
        >>> @dataclass(frozen=True)
        ... class Clip(Scheme):
        ...     limit: float = 0.1
        ...     def project(self, weight):
        ...         return weight.clamp(-self.limit, self.limit)
        >>> theta = Clip(0.5).bind(nn.Linear(4, 2)).pi({"weight": torch.full((2, 4), 3.0)})
        >>> theta["weight"].decode().max()
        tensor(0.5000)

    Attributes:
        include: Regular expressions over parameter names; empty selects all of ``types``.
        exclude: Regular expressions over parameter names to leave alone.
        types: Class names of the layers to compress; empty for the scheme's own.
    """

    include: str | Sequence[str] = field(default=(), kw_only=True)
    exclude: str | Sequence[str] = field(default=(), kw_only=True)
    types: str | Sequence[str] = field(default=(), kw_only=True)

    #: Position in a composition: prune, then project values, then quantize.
    order: ClassVar[int] = PROJECT
    #: Layers compressed where ``types`` is empty.
    default_types: ClassVar[tuple[str, ...]] = WEIGHT_TYPES
    #: Whether it makes several tensors of a weight. A composition may round these after it, each by
    #: itself, and do nothing else to the weight: zeros of a pruning before it would not stay.
    splits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "types"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in ("include", "exclude"):
            for pattern in getattr(self, name):
                check_pattern(name, pattern)

    # -- what a subclass defines -----------------------------------------------------------------

    def project(self, weight: Tensor) -> Tensor:
        """The nearest weight the scheme allows, of the same shape; elementwise schemes only."""
        raise TypeError(f"{type(self).__name__} must define project() or compress()")

    def compress(
        self, theta: Mapping[str, Encoded], targets: Sequence[Target]
    ) -> Mapping[str, Encoding]:
        """One stage of Π: new encodings for the scheme's own tensors.

        Args:
            theta: Encodings so far, by parameter name. A weight that an earlier stage split is
                here as several, under names and targets of their own.
            targets: The tensors of this scheme.

        Returns:
            Encodings of the tensors it changed. Pruned elements stay exactly zero.

        Raises:
            NotFiniteError: If a weight is not finite.
        """
        require_finite({t.name: theta[t.name].codes for t in targets})
        changed = {}
        for target in targets:
            encoded = theta[target.name]
            codes = self.project(encoded.codes)
            if encoded.mask is not None:
                codes = where(encoded.mask, codes)  # a product could leave -0.0
            changed[target.name] = encoded.replace(codes=codes)
        return changed

    def check(self, targets: Sequence[Target]) -> None:
        """Raise ``ValueError`` where the scheme cannot compress a selected tensor."""

    def trace(self, module: nn.Module) -> ChannelGraph:
        """The channels of a module, for :meth:`bind`; empty where the scheme has no use for them.

        Tracing takes the longer part of a second: to bind several schemes that differ in numbers
        only, trace once.
        """
        return ChannelGraph()

    def resolve(
        self, targets: tuple[Target, ...], graph: ChannelGraph
    ) -> tuple[Scheme, tuple[Target, ...]]:
        """The stage to use on a module, and its targets.

        Args:
            targets: What the scheme selects of the module.
            graph: What :meth:`trace` found.
        """
        return self, targets

    def structure(self, targets: Sequence[Target]) -> object:
        """What the scheme makes of its targets, comparable: equal for schemes that do the same."""
        return self

    @property
    def quantizes(self) -> bool:
        """Whether it rounds the values that are stored."""
        return self.order == QUANTIZE

    @property
    def latent(self) -> bool:
        """Whether L-C keeps a latent weight beside what this scheme makes of it.

        Training steps may be too small to move a rounded weight: they add up in the latent one. A
        scheme among whose results one can move in small steps, such as matrices of one rank, has
        the weight itself moved to what it makes of it, as pruning does.
        """
        return self.order != PRUNE

    @property
    def tolerance(self) -> float:
        """How far Π may move float32 weights that it made itself, as a share of their norm.

        0 for a projection in the strict sense, which gives back the same bits.
        """
        return 0.0

    def relaxed(self: S, progress: float) -> S:
        """The scheme part of the way from dense (0) to compressed (1), for ramps."""
        return self

    def effects(
        self,
        targets: Sequence[Target],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """What to first order the loss would feel if a group were zero, by target.

        Args:
            targets: The tensors of this scheme.
            weights: By parameter name.
            gradients: Of the loss; names may be missing.

        Returns:
            A number for each group; nothing for schemes that do not judge by it.
        """
        return {}

    def judged(
        self,
        theta: Mapping[str, Encoded],
        targets: Sequence[Target],
        effects: Mapping[str, Tensor],
    ) -> dict[str, Encoded]:
        """What a pruning scheme compares in the place of weights, given effects of its groups."""
        return {}

    def names(self, targets: Sequence[Target]) -> list[str]:
        """The parameters that the scheme changes."""
        return [t.name for t in targets]

    # -- what every scheme has -------------------------------------------------------------------

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Class names of the layers that the scheme selects."""
        return tuple(self.types) or self.default_types

    @property
    def stages(self) -> tuple[Scheme, ...]:
        """The schemes composed, first applied first; itself for a single one."""
        return (self,)

    def select(self, module: nn.Module) -> list[Target]:
        """The weights of ``module`` that the scheme compresses.

        Raises:
            SelectionError: If there is none, or a pattern matches none.
        """
        return select(module, self.layer_types, self.include, self.exclude)

    def skipped(self, module: nn.Module) -> list[Skipped]:
        """The parameters of ``module`` that the scheme leaves alone, and why."""
        return skipped(module, self.layer_types, self.include, self.exclude)

    def held(self, module: nn.Module) -> list[Skipped]:
        """Selected weights that the scheme cannot treat in full, and why."""
        return []

    def selected(self, module: nn.Module) -> set[str]:
        """The parameters that the stages select, as far as is known without a trace."""
        return {name for stage in self.stages for name in stage.names(stage.select(module))}

    def bind(self, module: nn.Module, graph: ChannelGraph | None = None) -> BoundScheme:
        """Resolve the scheme against a module, checking everything that can be checked.

        Args:
            module: The module.
            graph: What :meth:`trace` found in it, where that is known.

        Raises:
            SelectionError: If a stage selects nothing.
            ValueError: If a stage cannot compress what it selects, or a search dimension is
                still open.
        """
        if self.space():
            raise ValueError(
                f"the scheme still has open dimensions {sorted(self.space())}: "
                "give values with scheme.at(...), or search them with CondensaSearch"
            )
        graph = self.trace(module) if graph is None else graph
        stages = []
        for scheme in self.stages:
            stage, targets = scheme.resolve(tuple(scheme.select(module)), graph)
            stage.check(targets)
            stages.append((stage, targets))
        order = [name for name, _ in module.named_parameters()]
        used = {name for stage, targets in stages for name in stage.names(targets)}
        names = tuple(name for name in order if name in used)
        return BoundScheme(self, tuple(stages), names, frozenset(self.selected(module)))

    def space(self) -> dict[str, Dimension]:
        """The open search dimensions by name, in a fixed order."""
        return {f.name: v for f in fields(self) if is_dimension(v := getattr(self, f.name))}

    def at(self: S, values: Mapping[str, Any]) -> S:
        """The scheme with search dimensions replaced by values.

        Raises:
            ValueError: If a name is not a dimension of the scheme, or a value is not accepted.
        """
        self.check_dimensions(values)
        return replace(self, **values)

    def check_dimensions(self, names: Iterable[str]) -> None:
        """Raise ``ValueError`` unless every name is an open search dimension."""
        if unknown := sorted(set(names) - set(self.space())):
            raise ValueError(f"no search dimension {unknown}; there are {sorted(self.space())}")

    # -- as text and plain data ------------------------------------------------------------------

    def describe(self) -> str:
        """One line for people: the class, its main fields and what differs from the defaults.

        Example:
            >>> from lightning_condensa import Prune
            >>> Prune(0.1).describe()
            'Prune(density=0.1)'
        """
        shown = {f.name: getattr(self, f.name) for f in fields(self) if not f.kw_only}
        shown.update(changed_fields(self))
        settings = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return f"{type(self).__name__}({settings})"

    def to_config(self) -> dict[str, Any]:
        """The scheme as ``{"class_path": …, "init_args": {…}}``, the layout of jsonargparse.

        Raises:
            ValueError: If a field holds something that plain data cannot, such as a function.

        Example:
            >>> from lightning_condensa import Prune
            >>> Prune(0.05).to_config()
            {'class_path': 'lightning_condensa.Prune', 'init_args': {'density': 0.05}}
        """
        config: dict[str, Any] = encode(self)
        return config

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Scheme:
        """The scheme that :meth:`to_config` wrote.

        ``class_path`` may be a bare name for the schemes of this package. Other classes are
        imported by their path, so only read configurations you would also run.

        Raises:
            ValueError: If the configuration does not describe a scheme.
        """
        value = decode(config)
        if not isinstance(value, Scheme):
            raise ValueError(f"the configuration must describe a scheme, got {config!r}")
        return value

    def to_yaml(self) -> str:
        """The scheme as YAML."""
        return yaml.safe_dump(self.to_config(), sort_keys=False)

    @staticmethod
    def from_yaml(text: str) -> Scheme:
        """The scheme in a YAML text.

        Raises:
            ValueError: If the text is not YAML, or does not describe a scheme.

        Example:
            >>> Scheme.from_yaml("{class_path: Prune, init_args: {density: 0.05}}").describe()
            'Prune(density=0.05)'
        """
        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"not YAML: {error}") from error
        return Scheme.from_config(config)
