"""A scheme resolved against a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_condensa.functional.placement import elementwise
from lightning_condensa.schemes.encoded import Encoded
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
    """

    scheme: Scheme
    stages: tuple[tuple[Scheme, tuple[Target, ...]], ...]
    names: tuple[str, ...]

    @property
    def prunes(self) -> bool:
        """Whether a stage removes weights."""
        return any(stage.order == PRUNE for stage, _ in self.stages)

    @property
    def pruned(self) -> tuple[str, ...]:
        """The parameters that some stage prunes."""
        return self._names(lambda stage: stage.order == PRUNE)

    @property
    def projected(self) -> tuple[str, ...]:
        """The parameters whose kept values some stage changes."""
        return self._names(lambda stage: stage.order != PRUNE)

    def _names(self, which: Callable[[Scheme], bool]) -> tuple[str, ...]:
        names = {n for stage, targets in self.stages if which(stage) for n in stage.names(targets)}
        return tuple(n for n in self.names if n in names)

    @property
    def projects(self) -> bool:
        """Whether a stage changes the values of weights that are kept."""
        return any(stage.order != PRUNE for stage, _ in self.stages)

    def pi(
        self,
        weights: Mapping[str, Tensor],
        metric: Mapping[str, Tensor] | None = None,
        effects: Sequence[Mapping[str, Tensor]] = (),
    ) -> dict[str, Encoded]:
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

        Returns:
            θ, an encoding for each name.

        Raises:
            NotFiniteError: If a weight is not finite.
        """
        theta = {name: Encoded.dense(weights[name].detach()) for name in self.names}
        for index, (stage, targets) in enumerate(self.stages):
            own = effects[index] if effects else {}
            if (metric or own) and stage.order == PRUNE:
                theta.update(_chosen(stage, targets, theta, metric or {}, own))
            else:
                theta.update(stage.compress(theta, targets))
        return theta

    def pi_on_support(
        self, weights: Mapping[str, Tensor], support: Mapping[str, Tensor]
    ) -> dict[str, Encoded]:
        """Π where it is settled what is pruned.

        Args:
            weights: The tensors called :attr:`names`; others are ignored.
            support: Boolean tensors, true where an element is kept; a name that is missing is not
                pruned.
        """
        theta = {name: Encoded.dense(weights[name].detach()) for name in self.names}
        for name, mask in support.items():
            theta[name] = theta[name].masked(mask)
        for stage, targets in self.stages:
            if stage.order != PRUNE:
                theta.update(stage.compress(theta, targets))
        return theta

    def delta(self, theta: Mapping[str, Encoded]) -> dict[str, Tensor]:
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


def _chosen(
    stage: Scheme,
    targets: Sequence[Target],
    theta: Mapping[str, Encoded],
    metric: Mapping[str, Tensor],
    effects: Mapping[str, Tensor],
) -> dict[str, Encoded]:
    """What a pruning stage keeps when it judges by gradients, with the values as they are."""
    judged = dict(theta)
    for name in stage.names(targets):
        if name in metric:
            codes = elementwise(torch.mul, theta[name].codes, metric[name])
            judged[name] = theta[name].replace(codes=codes)
    judged.update(stage.judged(theta, targets, effects))
    chosen = stage.compress(judged, targets)
    return {n: theta[n].masked(e.mask) for n, e in chosen.items() if e.mask is not None}
