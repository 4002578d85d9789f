"""Pruning of whole hidden units of recurrent layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_condensa.functional.spans import Spans
from lightning_condensa.schemes.joint import JointPrune, JointTarget, Member, left_alone
from lightning_condensa.schemes.selection import (
    RECURRENT_TYPES,
    SelectionError,
    Skipped,
    Target,
    require_matches,
    shorten,
    unwanted,
)


@dataclass(frozen=True)
class HiddenPrune(JointPrune):
    """Remove whole hidden units of LSTM, GRU and plain recurrent layers.

    Of a removed unit the rows of all gates, in the weights of inputs and of hidden units, are zero,
    with their biases. Then its state, which starts as zero, stays zero: of an LSTM
    ``c = σ(0)·0 + σ(0)·tanh(0)``, of a GRU ``h = (1 − σ(0))·tanh(0) + σ(0)·0``. A unit is scored
    over all of these weights.

    Each layer and direction has units of its own. One ``hidden_size`` holds for all layers of a
    module, so that :meth:`~lightning_condensa.CompressedModel.shrink` takes as many out of each as
    the one that loses fewest: ``scope="layer"`` lets all lose the same.

    Example:
        >>> scheme = HiddenPrune(0.5, scope="layer")
        >>> [target.name for target in scheme.select(nn.LSTM(3, 4, num_layers=2))]
        ['weight_ih_l0', 'weight_ih_l1']

    Attributes:
        include: Regular expressions over the names of input weights (``rnn.weight_ih_l0``), by
            which layers and directions go; so are ``exclude`` and ``overrides``.
        types: Class names of recurrent layers and cells, or of their bases.
    """

    default_types: ClassVar[tuple[str, ...]] = RECURRENT_TYPES

    def select(self, module: nn.Module) -> list[Target]:
        """The layers and directions whose units are pruned.

        Raises:
            SelectionError: If there is none, or a pattern matches none.
        """
        found = list(self._found(module))
        names = [target.name for target in found]
        require_matches(names, self.include, self.exclude)
        chosen = [t for t in found if unwanted(t.name, self.include, self.exclude) is None]
        if not chosen:
            raise SelectionError(
                f"HiddenPrune finds no recurrent layer in {type(module).__name__} "
                f"(types={self.layer_types}, include={self.include}, exclude={self.exclude}); "
                f"there are {shorten(names)}"
            )
        return list(chosen)

    def skipped(self, module: nn.Module) -> list[Skipped]:
        """The parameters that belong to no unit that may go, and why."""
        reasons: dict[str, str] = {}
        chosen: list[Target] = []
        for target in self._found(module):
            reason = unwanted(target.name, self.include, self.exclude)
            if reason is None:
                chosen.append(target)
            else:
                reasons.update(dict.fromkeys(self.names([target]), reason))
        return left_alone(module, self.names(chosen), reasons)

    def _found(self, module: nn.Module) -> Iterator[JointTarget]:
        """Each layer and direction of each recurrent module."""
        names = {id(p): name for name, p in module.named_parameters()}
        for _, layer in module.named_modules():
            if {base.__name__ for base in type(layer).__mro__}.isdisjoint(self.layer_types):
                continue
            own = dict(layer.named_parameters(recurse=False))
            for name, weight in own.items():
                if name.startswith("weight_ih"):
                    place = name.removeprefix("weight_ih")
                    units: int = layer.hidden_size
                    spans = Spans(units, (units,) * (len(weight) // units))
                    weights, biases = (
                        tuple(
                            Member(names[id(p)], spans)
                            for p in map(own.get, places)
                            if p is not None
                        )
                        for places in (
                            (f"weight_ih{place}", f"weight_hh{place}"),
                            (f"bias_ih{place}", f"bias_hh{place}"),
                        )
                    )
                    yield JointTarget(
                        weights[0].name,
                        tuple(weight.shape),
                        type(layer).__name__,
                        weights=weights,
                        biases=biases,
                    )
