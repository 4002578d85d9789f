"""Pruning of whole hidden units of recurrent layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from lightning_condensa.functional.spans import Spans
from lightning_condensa.schemes.joint import Candidate, JointPrune, JointTarget, Member
from lightning_condensa.schemes.selection import RECURRENT_TYPES


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
    kind: ClassVar[str] = "recurrent layer"

    def candidates(self, module: nn.Module) -> Iterator[Candidate]:
        """Each layer and direction of each recurrent module."""
        names = {id(p): name for name, p in module.named_parameters()}
        for layer in module.modules():
            if {base.__name__ for base in type(layer).__mro__}.isdisjoint(self.layer_types):
                continue
            for name in (n for n, _ in layer.named_parameters(recurse=False)):
                if name.startswith("weight_ih"):
                    target = partial(_target, layer, name.removeprefix("weight_ih"), names)
                    members = target().weights + target().biases
                    yield Candidate(members[0].name, tuple(m.name for m in members), target)


def _target(layer: nn.Module, place: str, names: Mapping[int, str]) -> JointTarget:
    """The units of one layer and direction.

    Args:
        layer: The recurrent module.
        place: What follows ``weight_ih`` in the names of its parameters.
        names: Of parameters in the whole module, by identity.
    """
    units: int = layer.hidden_size  # type: ignore[assignment]
    weight = layer.get_parameter(f"weight_ih{place}")
    spans = Spans(units, (units,) * (len(weight) // units))
    own = dict(layer.named_parameters(recurse=False))

    def members(*kinds: str) -> tuple[Member, ...]:
        found = (own.get(f"{kind}{place}") for kind in kinds)
        return tuple(Member(names[id(p)], spans) for p in found if p is not None)

    weights = members("weight_ih", "weight_hh")
    return JointTarget(
        weights[0].name,
        tuple(weight.shape),
        type(layer).__name__,
        weights=weights,
        biases=members("bias_ih", "bias_hh"),
    )
