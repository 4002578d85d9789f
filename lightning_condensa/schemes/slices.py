"""Structured pruning of output units, with what follows from them in the network."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_condensa.functional.grouping import Grouping, Slices
from lightning_condensa.functional.placement import flat
from lightning_condensa.functional.ranks import Ranks
from lightning_condensa.graph import ChannelGraph, trace_example
from lightning_condensa.schemes.base import Scheme
from lightning_condensa.schemes.bound import PRUNE
from lightning_condensa.schemes.coupling import (
    Coupling,
    FollowingNorm,
    couplings,
    following_norms,
    stuck,
)
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.finite import require_finite
from lightning_condensa.schemes.prune import Pool
from lightning_condensa.schemes.selection import (
    CONV_TYPES,
    LINEAR_TYPES,
    SelectionError,
    Skipped,
    Target,
    is_norm,
)
from lightning_condensa.schemes.structured import GroupPrune


@dataclass(frozen=True)
class SlicePrune(GroupPrune):
    """Remove output units, rows or filters, with all that goes with them; base of two schemes.

    What comes after a layer is found in the graph of the module's forward pass, on its
    ``example_input_array`` (Lightning's convention: a tensor, a tuple of positional arguments or a
    dictionary of keyword arguments).

    Attributes:
        prune_norm: Also zero γ and β of the norm layer that follows a removed unit: with a β that
            is not zero the unit would still pass on a constant. Where the forward pass cannot be
            followed, norms are left alone, with a warning.
        coupled: Score and remove as one the units that a sum, a product or a depthwise or grouped
            convolution ties together, so that they can be taken out of the network
            (:meth:`~lightning_condensa.CompressedModel.shrink`). ``density`` is then the share of
            these groups that is kept, of all that can be taken out; other units (outputs of the
            network, say) stay and are not counted. ``scope="layer"``, ``min_per_layer`` and
            ``align`` apply to the groups that the same weights share, and a pattern of
            ``overrides`` to all groups of a weight that it matches.
    """

    prune_norm: bool = field(default=True, kw_only=True)
    coupled: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coupled and self.criterion == "taylor":
            raise ValueError(
                "criterion='taylor' judges single units: with coupled=True take 'l2', which the "
                "default L-C takes in a metric of gradients too"
            )

    def grouping(self, target: Target) -> Grouping:
        """One group for each output unit."""
        return Slices(transposed=target.transposed, groups=target.groups)

    def names(self, targets: Sequence[Target]) -> list[str]:
        """The weights, and biases that go with them."""
        biases = [t.bias for t in targets if self.prune_bias and t.bias is not None]
        return [*super().names(targets), *biases]

    def sums(self, target: Target, tensors: Mapping[str, Tensor]) -> Tensor:
        """The sum over a unit's weights and its bias."""
        sums = super().sums(target, tensors)
        if not self.prune_bias or target.bias is None:
            return sums
        return sums + tensors[target.bias].view(sums.shape)

    def masked(
        self,
        theta: Mapping[str, Encoded],
        targets: Sequence[Target],
        keeps: Mapping[str, Tensor],
    ) -> dict[str, Encoded]:
        """Weights and biases without the units that do not survive."""
        changed = super().masked(theta, targets, keeps)
        for target in targets:
            if self.prune_bias and target.bias is not None:
                changed[target.bias] = theta[target.bias].masked(flat(keeps[target.name]))
        return changed

    def trace(self, module: nn.Module) -> ChannelGraph:
        """The channels of a module, where the scheme has a use for them.

        Raises:
            ValueError: With ``coupled=True``, if the module has no example input, cannot be
                traced, or is sharded.
        """
        has_norms = any(is_norm(layer) for layer in module.modules())
        if not self.coupled and not (self.prune_norm and has_norms):
            return ChannelGraph()
        try:
            return trace_example(module)
        except ValueError as error:
            if self.coupled:
                raise ValueError(f"{type(self).__name__}(coupled=True): {error}") from error
            warnings.warn(
                f"norm layers of {type(module).__name__} keep the constants that they add to what "
                f"{type(self).__name__} removes (prune_norm=False: without this warning): {error}",
                UserWarning,
                stacklevel=3,
            )
        return ChannelGraph()

    def resolve(
        self, targets: tuple[Target, ...], graph: ChannelGraph
    ) -> tuple[Scheme, tuple[Target, ...]]:
        """The scheme with the norms and groups that it found in the graph.

        Raises:
            SelectionError: With ``coupled=True``, if nothing can be taken out.
        """
        coupled = None
        if self.coupled:
            coupled = couplings(graph, targets, self.prune_bias, self.prune_norm)
            if not coupled:
                raise SelectionError(
                    f"{type(self).__name__}(coupled=True) finds nothing that can be taken out: "
                    + "; ".join(f"{s.name}: {s.reason}" for s in self._stuck(targets, graph)[:4])
                )
            members = {name for coupling in coupled for name in coupling.names}
            targets = tuple(t for t in targets if t.name in members)
        norms = following_norms(graph, targets, self.prune_bias) if self.prune_norm else ()
        return LinkedPrune(self, norms, coupled), targets

    def held(self, module: nn.Module) -> list[Skipped]:
        """With ``coupled=True`` the weights with units that cannot be taken out, and why."""
        return self._stuck(self.select(module), self.trace(module)) if self.coupled else []

    def _stuck(self, targets: Sequence[Target], graph: ChannelGraph) -> list[Skipped]:
        return stuck(graph, targets, self.prune_bias, self.prune_norm)


@dataclass(frozen=True)
class NeuronPrune(SlicePrune):
    """Remove whole neurons: rows of Linear layers, with their biases."""

    default_types: ClassVar[tuple[str, ...]] = LINEAR_TYPES


@dataclass(frozen=True)
class FilterPrune(SlicePrune):
    """Remove whole filters of convolutions, transposed and grouped ones too, with biases."""

    default_types: ClassVar[tuple[str, ...]] = CONV_TYPES


@dataclass(frozen=True, eq=False)
class LinkedPrune(Scheme):
    """A :class:`SlicePrune` resolved against the channels of one module.

    Attributes:
        scheme: The scheme.
        norms: The norm layers that follow what it removes.
        couplings: What is removed as one; ``None`` where each unit is for itself.
    """

    scheme: SlicePrune
    norms: tuple[FollowingNorm, ...]
    couplings: tuple[Coupling, ...] | None

    order: ClassVar[int] = PRUNE

    def names(self, targets: Sequence[Target]) -> list[str]:
        """The weights, their biases, and γ and β of the norms."""
        norms = [name for norm in self.norms for name in norm.parameters]
        return [*self.scheme.names(targets), *norms]

    def compress(
        self, theta: Mapping[str, Encoded], targets: Sequence[Target]
    ) -> dict[str, Encoded]:
        """Zero units with all that goes with them."""
        keeps = self.keeps(theta, targets)
        changed = self.scheme.masked(theta, targets, keeps)
        for norm in self.norms:
            keep = norm.keep(keeps)
            changed.update({name: theta[name].masked(keep) for name in norm.parameters})
        return changed

    def keeps(self, theta: Mapping[str, Encoded], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Which units of each weight survive."""
        if self.couplings is None:
            return self.scheme.keeps(theta, targets)
        keeps = {}
        for target in targets:
            grid = self.scheme.grouping(target).grid(torch.Size(target.shape))
            keeps[target.name] = theta[target.name].codes.new_ones(grid, dtype=torch.bool)
        for pool in self.scheme.pools(self.couplings):
            scores = [self.score(coupling, theta) for coupling in pool.members]
            chosen = self.scheme.chosen(pool, scores)
            for coupling, keep in zip(pool.members, chosen, strict=True):
                for name, units in zip(coupling.names, coupling.units, strict=True):
                    keeps[name].view(-1)[units.to(keep.device)] = keep[:, None]
        return keeps

    def score(self, coupling: Coupling, theta: Mapping[str, Encoded]) -> Tensor:
        """The criterion over all weights of each group."""
        require_finite({name: theta[name].codes for name in coupling.names})
        rows = []
        for target, units in zip(coupling.targets, coupling.units, strict=True):
            slices, _ = self.scheme.grouping(target).split(theta[target.name].codes)
            rows.append(slices[units.to(slices.device)].flatten(1))
        joined = torch.cat(rows, dim=1)
        sizes = joined.new_full((len(joined), 1), joined.shape[1], dtype=torch.float32)
        return self.scheme.rate(joined, sizes, coupling.name, Ranks())

    def effects(
        self,
        targets: Sequence[Target],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """What to first order the loss would feel, as for the scheme itself."""
        return self.scheme.effects(targets, weights, gradients)

    def judged(
        self,
        theta: Mapping[str, Encoded],
        targets: Sequence[Target],
        effects: Mapping[str, Tensor],
    ) -> dict[str, Encoded]:
        """What is compared in the place of weights, as for the scheme itself."""
        return self.scheme.judged(theta, targets, effects)

    def pools(self, targets: Sequence[Target]) -> Iterator[Pool[Any]]:
        """What shares a threshold: weights, or the groups of the same weights."""
        return self.scheme.pools(targets if self.couplings is None else self.couplings)

    def left(self, theta: Mapping[str, Encoded], member: Target | Coupling) -> tuple[int, int]:
        """How many units or groups are not zero, and how many there are."""
        if isinstance(member, Target):
            return self.scheme.left(theta, member)
        alive = torch.zeros(member.groups, dtype=torch.bool)
        for target, units in zip(member.targets, member.units, strict=True):
            slices, _ = self.scheme.grouping(target).split(theta[target.name].codes.cpu() != 0)
            alive |= slices.any(1)[units].any(1)
        return int(alive.sum()), member.groups

    def check(self, targets: Sequence[Target]) -> None:
        """Check that every pool keeps something of every weight."""
        if self.couplings is None:
            self.scheme.check(targets)
        else:
            self._kept(self.couplings)

    def structure(self, targets: Sequence[Target]) -> object:
        """The count that each pool keeps."""
        if self.couplings is None:
            return self.scheme.structure(targets)
        return replace(self.scheme, density=1.0, overrides={}), self._kept(self.couplings)

    def _kept(self, couplings: Sequence[Coupling]) -> tuple[object, ...]:
        return tuple(
            (
                tuple(coupling.name for coupling in pool.members),
                self.scheme.kept(pool, [coupling.groups for coupling in pool.members]),
            )
            for pool in self.scheme.pools(couplings)
        )

    def relaxed(self, progress: float) -> LinkedPrune:
        """The scheme part of the way, with the same norms and groups."""
        return replace(self, scheme=self.scheme.relaxed(progress))

    def describe(self) -> str:
        """The scheme in one line."""
        return self.scheme.describe()
