"""Which output units go together, and which norm parameters follow them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_condensa.functional.placement import flat, whole
from lightning_condensa.graph import ChannelGraph, Removal
from lightning_condensa.schemes.selection import Skipped, Target

#: Weights and units that make a channel; ``None`` for something that stays.
_Makers: TypeAlias = set[tuple[str, int] | None]


@dataclass(frozen=True, eq=False)
class FollowingNorm:
    """A norm layer whose γ and β go with the output units of other layers.

    Attributes:
        parameters: Names of γ and β.
        producers: The weights that make its channels.
        units: For each channel the units that make it, shape ``(channels, most units)``: positions
            in the units of all producers one after the other; one past them stands for something
            that stays.
    """

    parameters: tuple[str, ...]
    producers: tuple[str, ...]
    units: Tensor

    def keep(self, keeps: Mapping[str, Tensor]) -> Tensor:
        """Which channels stay: those of which a unit stays.

        Args:
            keeps: Which units of each weight stay.
        """
        verdicts = [whole(flat(keeps[name])) for name in self.producers]
        stays = torch.cat([*verdicts, verdicts[0].new_ones(1)])
        return stays[self.units.to(stays.device)].any(1)


@dataclass(frozen=True, eq=False)
class Coupling:
    """Groups of output units, each to be kept or removed as one, of the same weights.

    Attributes:
        targets: The weights.
        units: For each weight its units in each group, shape ``(groups, units of a group)``.
    """

    targets: tuple[Target, ...]
    units: tuple[Tensor, ...]

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.units[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The weights' names."""
        return tuple(t.name for t in self.targets)

    @property
    def name(self) -> str:
        """The weights' names in one."""
        return " + ".join(self.names)


def following_norms(
    graph: ChannelGraph, targets: Sequence[Target], with_biases: bool
) -> tuple[FollowingNorm, ...]:
    """The norm layers whose input some units make zero.

    A channel of a sum follows when all units that are added are removed.

    Args:
        graph: The channels of the module.
        targets: The weights whose units are removed.
        with_biases: Whether their biases go along.
    """
    origins = graph.origins(Removal({t.name: with_biases for t in targets}))
    places = _places(graph, {t.name for t in targets})
    layers: dict[tuple[str, ...], list[_Makers]] = {}
    for norm in graph.norms:
        parameters = tuple(n for n in (norm.weight, norm.bias) if n is not None)
        made_by = [origins[c] for c in norm.inputs.tolist()]
        makers: list[_Makers] = [{None} if o is None else {places[c] for c in o} for o in made_by]
        if parameters in layers:  # a layer that is called again: all that it sees must be zero
            makers = [a | b for a, b in zip(layers[parameters], makers, strict=True)]
        if parameters:
            layers[parameters] = makers
    sizes = {p.weight: len(p.outputs) for p in graph.products}
    return tuple(
        _following(parameters, makers, sizes)
        for parameters, makers in layers.items()
        if any(None not in units for units in makers)
    )


def _following(
    parameters: tuple[str, ...],
    makers: Sequence[_Makers],
    sizes: Mapping[str, int],
) -> FollowingNorm:
    producers = tuple(dict.fromkeys(m[0] for units in makers for m in units if m is not None))
    offsets, total = {}, 0
    for name in producers:
        offsets[name] = total
        total += sizes[name]
    rows = [[total if m is None else offsets[m[0]] + m[1] for m in units] for units in makers]
    most = max(map(len, rows))
    padded = [row + row[:1] * (most - len(row)) for row in rows]
    return FollowingNorm(parameters, producers, torch.tensor(padded))


def couplings(
    graph: ChannelGraph, targets: Sequence[Target], with_biases: bool, with_norms: bool
) -> tuple[Coupling, ...]:
    """The groups of output units that can be taken out of the network.

    Those are the groups of the graph that are not pinned, and of which everything that reads them
    sees zeros when the units of ``targets`` in them are removed.

    Args:
        graph: The channels of the module.
        targets: The weights whose units can be removed.
        with_biases: Whether their biases go along.
        with_norms: Whether γ and β of the norms that follow go along.

    Returns:
        The groups, those of the same weights together.
    """
    reasons = _reasons(graph, targets, with_biases, with_norms)
    members: dict[int, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    names = [t.name for t in targets]
    for channel, (name, unit) in _places(graph, set(names)).items():
        group = int(graph.groups[channel])
        if group not in reasons:
            members[group][name].add(unit)
    alike: dict[tuple[tuple[str, int], ...], list[list[list[int]]]] = defaultdict(list)
    for group in sorted(members):
        units = {name: sorted(members[group][name]) for name in names if name in members[group]}
        alike[tuple((name, len(u)) for name, u in units.items())].append(list(units.values()))
    by_name = {t.name: t for t in targets}
    return tuple(
        Coupling(
            tuple(by_name[name] for name, _ in key),
            tuple(torch.tensor(units) for units in zip(*groups, strict=True)),
        )
        for key, groups in alike.items()
    )


def stuck(
    graph: ChannelGraph, targets: Sequence[Target], with_biases: bool, with_norms: bool
) -> list[Skipped]:
    """The weights that have units which cannot be taken out of the network, and why."""
    reasons = _reasons(graph, targets, with_biases, with_norms)
    found: dict[str, dict[str, int]] = {t.name: {} for t in targets}
    counts: dict[str, int] = {}
    for channel, (name, _) in _places(graph, set(found)).items():
        counts[name] = counts.get(name, 0) + 1
        reason = reasons.get(int(graph.groups[channel]))
        if reason is not None:
            found[name][reason] = found[name].get(reason, 0) + 1
    skipped = []
    for name, why in found.items():
        if name not in counts:
            skipped.append(Skipped(name, "used in a way through which no channel is followed"))
        for reason, count in why.items():
            some = "" if count == counts[name] else f"{count} of {counts[name]} units: "
            skipped.append(Skipped(name, some + reason))
    return skipped


def _reasons(
    graph: ChannelGraph, targets: Sequence[Target], with_biases: bool, with_norms: bool
) -> dict[int, str]:
    """The groups that cannot be taken out, with the reason."""
    origins = graph.origins(Removal({t.name: with_biases for t in targets}, with_norms))
    reasons = dict(graph.pinned)
    for resize in graph.resizes:
        reasons.update(dict.fromkeys(resize.groups.tolist(), resize.reason))
    for product in graph.products:
        for channel in set(product.inputs.flatten().tolist()):
            if origins[channel] is None:
                reasons.setdefault(
                    int(graph.groups[channel]),
                    f"{product.weight} would still read something: a layer that is not selected, "
                    "a bias or norm that is kept, or a function that does not keep zeros",
                )
    return reasons


def _places(graph: ChannelGraph, names: set[str]) -> dict[int, tuple[str, int]]:
    """The weight and unit that make each channel, for the weights of some names."""
    return {
        channel: (product.weight, unit)
        for product in graph.products
        if product.weight in names
        for unit, channel in enumerate(product.outputs.tolist())
    }
