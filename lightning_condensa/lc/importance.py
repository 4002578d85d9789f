"""How much the loss feels each weight: mean squared gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_condensa.functional.placement import like, local, parts
from lightning_condensa.functional.ranks import Ranks

#: The least that a weight counts. One without a gradient still goes after those that are zero
#: already: zeros would take its place among the kept. Its square is a float32, too.
_FLOOR = 1e-15


class Importance:
    """The metric in which a pruning C-step projects: ``(E[g²])^(exponent/2)`` for each weight.

    With exponent 1 the ranking ``|w|·sqrt(E[g²])`` is that of optimal brain damage (LeCun et al.
    1989) under the diagonal empirical Fisher information, with 0 plain magnitude. A weight on a
    path that leads nowhere gets no gradient, and ranks last.

    Gradients are summed over some steps before each C-step; the sums are dropped after it.

    Args:
        exponent: In [0, 2].
    """

    def __init__(self, exponent: float) -> None:
        self.exponent = exponent
        self._squares: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe(self, parameters: Mapping[str, Tensor], only: Collection[int] | None) -> None:
        """Add the squares of the gradients that are there.

        Args:
            parameters: The compressed parameters by name.
            only: ``id`` of the parameters to look at; all of them where ``None``.
        """
        gradients, squares = [], []
        for name, parameter in parameters.items():
            if parameter.grad is None or (only is not None and id(parameter) not in only):
                continue
            gradient = local(parameter.grad)
            if name not in self._squares:
                dtype = torch.promote_types(gradient.dtype, torch.float32)
                self._squares[name] = torch.zeros_like(gradient, dtype=dtype)
            gradients.append(gradient.to(self._squares[name].dtype))
            squares.append(self._squares[name])
        if gradients:
            torch._foreach_addcmul_(squares, gradients, gradients)

    @torch.no_grad()
    def weigh(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The metric for the C-step, placed like the parameters; forgets the gradients.

        A parameter that the loss does not reach (a frozen one) counts like the average weight.
        Empty, for plain magnitudes, where no gradient was seen or one overflowed in mixed
        precision.
        """
        squares, self._squares = self._squares, {}
        if not squares or _overflowed(squares, parameters):
            return {}
        powers = {n: s.pow_(self.exponent / 2).clamp_(min=_FLOOR) for n, s in squares.items()}
        unseen = [n for n in parameters if n not in powers]
        if unseen:
            average = _mean(powers, parameters)
            for name in unseen:
                powers[name] = torch.full_like(local(parameters[name]), average)
        return {n: like(p, parameters[n]) for n, p in powers.items()}

    def state_dict(self, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        """The sums, placed like the parameters."""
        return {n: like(s, parameters[n]) for n, s in self._squares.items()}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave, on the parameters' devices."""
        self._squares = parts(state, parameters)


def _overflowed(squares: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> bool:
    """Whether a sum is not finite, on any process."""
    bad = [not bool(s.sum().isfinite()) for s in squares.values()]
    return any(Ranks.holding(list(parameters.values())).totals(bad))


def _mean(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> float:
    """The mean of all elements, on all processes."""
    ranks = Ranks.holding([parameters[n] for n in values])
    own = [v for n, v in values.items() if ranks.own(parameters[n])]
    sums = [v.sum(dtype=torch.float64).to(ranks.device) for v in own]
    total = torch.stack([*sums, torch.zeros((), dtype=torch.float64, device=ranks.device)]).sum()
    count = ranks.totals([sum(v.numel() for v in own)])[0]
    return float(ranks.sum(total)) / count
