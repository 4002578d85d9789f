"""Structured pruning of groups that reach over several parameters of a layer."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_condensa.functional.grouping import Grouping
from lightning_condensa.functional.placement import whole
from lightning_condensa.functional.ranks import Ranks
from lightning_condensa.functional.spans import Spans
from lightning_condensa.schemes.encoded import Encoded
from lightning_condensa.schemes.finite import require_finite
from lightning_condensa.schemes.selection import (
    SelectionError,
    Skipped,
    Target,
    require_matches,
    shorten,
    unwanted,
)
from lightning_condensa.schemes.structured import GroupPrune


@dataclass(frozen=True)
class Member:
    """One parameter of a layer, cut into the spans of the layer's groups.

    Attributes:
        name: Its name in ``module.named_parameters()``.
        spans: Which of its elements belong to which group.
    """

    name: str
    spans: Spans


@dataclass(frozen=True)
class JointTarget(Target):
    """A layer whose groups reach over several parameters; it goes by the name of the first.

    Attributes:
        weights: Parameters that are scored; groups are removed from all of them.
        biases: Parameters that are not scored.
    """

    weights: tuple[Member, ...] = ()
    biases: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A layer that may have groups.

    Attributes:
        name: What it goes by in patterns: the name of its first weight.
        parameters: Names of all its parameters.
        target: Cuts it into groups, or raises :class:`SelectionError` where that cannot be.
    """

    name: str
    parameters: tuple[str, ...]
    target: Callable[[], JointTarget]


@dataclass(frozen=True)
class JointPrune(GroupPrune):
    """Remove groups from all the parameters of a layer that they reach over.

    A group is scored over all its elements. For that the weights of one layer after the other are
    made whole where they are DTensors.

    Subclasses say by :meth:`candidates` which layers there are, and by :attr:`kind` what they are.
    """

    kind: ClassVar[str]
    advice: ClassVar[str] = ""

    @abstractmethod
    def candidates(self, module: nn.Module) -> Iterable[Candidate]:
        """The layers of a module that may have groups, whatever the patterns say."""

    def select(self, module: nn.Module) -> list[Target]:
        """The layers whose groups are pruned.

        Raises:
            SelectionError: If there is none, a pattern matches none, or one cannot be cut into
                groups.
        """
        found = list(self.candidates(module))
        names = [candidate.name for candidate in found]
        require_matches(names, self.include, self.exclude)
        chosen = [c for c in found if unwanted(c.name, self.include, self.exclude) is None]
        if not chosen:
            raise SelectionError(
                f"{type(self).__name__} finds no {self.kind} in {type(module).__name__} "
                f"(types={self.layer_types}, include={self.include}, exclude={self.exclude}); "
                f"there are {shorten(names)}{self.advice}"
            )
        return [candidate.target() for candidate in chosen]

    def skipped(self, module: nn.Module) -> list[Skipped]:
        """The parameters that belong to no group that may go, and why."""
        reasons: dict[str, str] = {}
        chosen: list[Target] = []
        for candidate in self.candidates(module):
            reason = unwanted(candidate.name, self.include, self.exclude)
            if reason is None:
                chosen.append(candidate.target())
            else:
                reasons.update(dict.fromkeys(candidate.parameters, reason))
        pruned = set(self.names(chosen))
        rest = [name for name, _ in module.named_parameters() if name not in pruned]
        return [Skipped(name, reasons.get(name, "in no group of the scheme")) for name in rest]

    def members(self, target: Target) -> tuple[Member, ...]:
        """The parameters that groups are removed from."""
        assert isinstance(target, JointTarget)
        return target.weights + (target.biases if self.prune_bias else ())

    def grouping(self, target: Target) -> Grouping:
        """The groups of the parameter that gives the target its name."""
        return self.members(target)[0].spans

    def names(self, targets: Sequence[Target]) -> list[str]:
        """All the parameters that groups are removed from."""
        return [member.name for target in targets for member in self.members(target)]

    def check(self, targets: Sequence[Target]) -> None:
        """Check too that no parameter is part of two layers, or twice of one."""
        uses = Counter(self.names(targets))
        if twice := [name for name, count in uses.items() if count > 1]:
            raise ValueError(
                f"{type(self).__name__} would judge {', '.join(twice)} twice, as it is shared "
                "between projections: leave it out with exclude="
            )
        super().check(targets)

    def scores(self, theta: Mapping[str, Encoded], target: Target) -> Tensor:
        """The criterion over each group's magnitudes in all weights of the layer."""
        assert isinstance(target, JointTarget)
        codes = {m.name: theta[m.name].codes for m in target.weights}
        require_finite(codes)
        rows = torch.cat([m.spans.split(whole(codes[m.name]))[0] for m in target.weights], dim=1)
        sizes = torch.full((len(rows), 1), float(rows.shape[1]), device=rows.device)
        return self.rate(rows, sizes, target.name, Ranks())

    def sums(self, target: Target, tensors: Mapping[str, Tensor]) -> Tensor:
        """The sum over a group's elements in all parameters of the layer."""
        parts = [m.spans.split(tensors[m.name])[0].sum(1) for m in self.members(target)]
        return torch.stack(parts).sum(0)

    def spread(
        self, target: Target, values: Tensor, theta: Mapping[str, Encoded]
    ) -> dict[str, Tensor]:
        """One value for each group, in all of the layer's weights."""
        assert isinstance(target, JointTarget)
        return {m.name: m.spans.expand(values, theta[m.name].codes.shape) for m in target.weights}

    def masked(
        self,
        theta: Mapping[str, Encoded],
        targets: Sequence[Target],
        keeps: Mapping[str, Tensor],
    ) -> dict[str, Encoded]:
        """All the parameters without the groups that do not survive."""
        return {
            m.name: theta[m.name].masked(
                m.spans.expand(keeps[target.name], theta[m.name].codes.shape)
            )
            for target in targets
            for m in self.members(target)
        }
