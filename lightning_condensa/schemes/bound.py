"""A scheme resolved against a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_condensa.functional.placement import elementwise
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.encoding import Encoding
from lightning_condensa.schemes.selection import Target

if TYPE_CHECKING:
    from lightning_condensa.schemes.base import Scheme

PRUNE, PROJECT, QUANTIZE = range(3)


@dataclass(frozen=True)
class BoundScheme:
    """A scheme resolved against one module: Π and Δ as pure functions of named tensors.

    Attributes:
        scheme: The scheme.
        stages: Each stage with its targets, first applied first.
        names: Every parameter that some stage changes, in the module's order.
        selected: What :meth:`Scheme.selected` said when the scheme was bound: some of it may be
            left alone, and what goes with it is not in it.
    """

    scheme: Scheme
    stages: tuple[tuple[Scheme, tuple[Target, ...]], ...]
    names: tuple[str, ...]
    selected: frozenset[str] = frozenset()

    @property
    def prunes(self) -> bool:
        """Whether a stage removes weights."""
        return any(stage.order == PRUNE for stage, _ in self.stages)

    @property
    def pruned(self) -> tuple[str, ...]:
        """The parameters that some stage prunes."""
        return self._names(lambda stage: stage.order == PRUNE)

    @property
    def latent(self) -> tuple[str, ...]:
        """The parameters that need a latent weight in training: rounded ones, say."""
        return self._names(lambda stage: stage.latent)

    @property
    def moved(self) -> tuple[str, ...]:
        """The parameters whose kept values some stage changes without a latent weight."""
        return self._names(lambda stage: stage.order != PRUNE and not stage.latent)

    @property
    def direct(self) -> BoundScheme:
        """What is left of the scheme without the stages that need a latent weight."""
        stages = tuple((stage, targets) for stage, targets in self.stages if not stage.latent)
        return replace(self, stages=stages)

    def _names(self, which: Callable[[Scheme], bool]) -> tuple[str, ...]:
        names = {n for stage, targets in self.stages if which(stage) for n in stage.names(targets)}
        return tuple(n for n in self.names if n in names)

    @property
    def projects(self) -> bool:
        """Whether a stage changes the values of weights that are kept."""
        return any(stage.order != PRUNE for stage, _ in self.stages)

    @property
    def rounds(self) -> bool:
        """Whether all that is done to the values of weights that are kept is to round them."""
        return self.projects and all(s.order in (PRUNE, QUANTIZE) for s, _ in self.stages)

    def pi(
        self,
        weights: Mapping[str, Tensor],
        metric: Mapping[str, Tensor] | None = None,
        effects: Sequence[Mapping[str, Tensor]] = (),
        boundaries: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Encoding]:
        """Π: compress.

        Weights may be DTensors (FSDP2, tensor parallelism): θ is then sharded like them and, put
        together, the same as of the whole weights, which are never gathered. All processes that
        hold parts must make the call.

        Args:
            weights: The tensors called :attr:`names`; others are ignored.
            metric: What a change of an element counts, tensors of the weights' shapes: stages that
                prune judge ``weight · metric`` instead of the weight. Names may be missing.
            effects: For each stage what the loss would feel of the removal of its groups, by
                target, for stages that judge by it (:meth:`Scheme.effects`); empty if not known.
            boundaries: Of an earlier θ (:func:`boundaries_of`), to be kept: stages that round then
                only choose the values between them anew. Names may be missing.

        Returns:
            θ, an encoding for each name.

        Raises:
            NotFiniteError: If a weight is not finite.
        """
        theta = self._dense(weights, boundaries)
        for index, (stage, targets) in enumerate(self.stages):
            own = effects[index] if effects else {}
            if (metric or own) and stage.order == PRUNE:
                theta.update(_chosen(stage, targets, theta, metric or {}, own))
            else:
                theta.update(staged(stage, targets, theta))
        return theta

    def pi_on_support(
        self,
        weights: Mapping[str, Tensor],
        support: Mapping[str, Tensor],
        boundaries: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Encoding]:
        """Π where it is settled what is pruned.

        Args:
            weights: The tensors called :attr:`names`; others are ignored.
            support: Boolean tensors, true where an element is kept; a name that is missing is not
                pruned.
            boundaries: See :meth:`pi`.
        """
        theta = self._dense(weights, boundaries)
        for name, mask in support.items():
            (leaf,) = theta[name].leaves
            theta[name] = leaf.masked(mask)
        for stage, targets in self.stages:
            if stage.order != PRUNE:
                theta.update(staged(stage, targets, theta))
        return theta

    def _dense(
        self, weights: Mapping[str, Tensor], boundaries: Mapping[str, Tensor] | None
    ) -> dict[str, Encoding]:
        kept = boundaries or {}
        return {
            name: Encoded.dense(weights[name].detach()).replace(boundaries=kept.get(name))
            for name in self.names
        }

    def delta(self, theta: Mapping[str, Encoding]) -> dict[str, Tensor]:
        """Δ: decompress to dense tensors."""
        return {name: theta[name].decode() for name in self.names}

    @property
    def structure(self) -> tuple[object, ...]:
        """What the scheme makes of the module, comparable: equal for schemes that do the same."""
        return tuple(stage.structure(targets) for stage, targets in self.stages)

    def relaxed(self, progress: float) -> BoundScheme:
        """The same tensors under a scheme part of the way from dense (0) to compressed (1)."""
        if progress >= 1:
            return self
        stages = tuple((stage.relaxed(progress), targets) for stage, targets in self.stages)
        return replace(self, stages=stages)


def boundaries_of(theta: Mapping[str, Encoding]) -> dict[str, Tensor]:
    """Where rounding turned from one value to the next, of the weights of which that is known.

    Factors and sums have none: they are found anew each time.
    """
    single = {name: e.leaves[0] for name, e in theta.items() if len(e.leaves) == 1}
    return {n: leaf.boundaries for n, leaf in single.items() if leaf.boundaries is not None}


def bounded(encoding: Encoding, latent: Tensor) -> Tensor:
    """The nearest to a weight that training keeps where it was rounded to this encoding.

    Only what is a single tensor of codes has limits (:attr:`Encoded.limits`).
    """
    return encoding.leaves[0].bounded(latent) if len(encoding.leaves) == 1 else latent


def staged(
    stage: Scheme, targets: Sequence[Target], theta: Mapping[str, Encoding]
) -> dict[str, Encoding]:
    """One stage of Π, which takes the leaves of an encoding for tensors of their own.

    Args:
        stage: The stage.
        targets: Its tensors.
        theta: Encodings so far.

    Returns:
        The encodings that it changed.
    """
    keys = {name: _keys(name, encoding) for name, encoding in theta.items()}
    leaves = {k: e for name in keys for k, e in zip(keys[name], theta[name].leaves, strict=True)}
    parts = [_part(t, k, leaves[k]) for t in targets for k in keys[t.name]]
    found = stage.compress(leaves, parts)
    changed: dict[str, Encoding] = {}
    for name, own in keys.items():
        if len(own) == 1 and name in found:
            changed[name] = found[name]
        elif not found.keys().isdisjoint(own):
            new = [leaf for key in own for leaf in found.get(key, leaves[key]).leaves]
            changed[name] = theta[name].rebuilt(new)
    return changed


def _keys(name: str, encoding: Encoding) -> list[str]:
    """The names that the leaves of a parameter go by."""
    count = len(encoding.leaves)
    return [name] if count == 1 else [f"{name}[{i}]" for i in range(count)]


def _part(target: Target, key: str, leaf: Encoded) -> Target:
    """A leaf as a tensor to compress: of the weight's own layout, or a matrix."""
    if tuple(leaf.shape) == target.shape:
        return replace(target, name=key)
    return Target(key, tuple(leaf.shape), target.layer)


def _chosen(
    stage: Scheme,
    targets: Sequence[Target],
    theta: Mapping[str, Encoding],
    metric: Mapping[str, Tensor],
    effects: Mapping[str, Tensor],
) -> dict[str, Encoding]:
    """What a pruning stage keeps when it judges by gradients, with the values as they are."""
    # Pruning comes before all that would make several leaves of one.
    kept = {name: leaf for name, e in theta.items() for leaf in e.leaves}
    judged = dict(kept)
    for name in stage.names(targets):
        if name in metric:
            codes = elementwise(torch.mul, kept[name].codes, metric[name])
            judged[name] = kept[name].replace(codes=codes)
    judged.update(stage.judged(kept, targets, effects))
    chosen = stage.compress(judged, targets)
    return {n: kept[n].masked(e.mask) for n, e in chosen.items() if e.mask is not None}
