"""The default L-C: the user's optimizer steps, then the penalty's proximal operator.

Pruned weights are pulled to zero after each optimizer step,

    w ← (1 − rate) w        the proximal operator of μ/2 ‖w − 0‖², rate = μη / (1 + μη)

(Parikh & Boyd, "Proximal algorithms", 2014, §4.2: forward-backward splitting.) For a fixed support
the best values of a sparse θ are those of w itself, so weights that are kept are not pulled. At a
rate of 1 the constraint holds after every step: what is pruned stays zero, gets no gradient, and no
optimizer remembers it.

Where the scheme changes values in a way that small steps can follow (low rank), a C-step moves the
weight itself,

    w ← w + rate·(Δ(θ) − w)

and the rate grows to 1. Where it rounds them, the network computes with weights on the way from a
*latent* u to Δ(θ),

    w = u + rate·(Δ(θ) − u)        at a C-step; in the L-step after it w and u move alike

so that u = w − *offset*, and the optimizer's step on w is one on u: neither a second copy of the
weights nor a pass over them is needed. C-steps project u, which keeps what is too small to move a
rounded weight. This is the aggregate proximal gradient method (Jin et al. 2025, arXiv:2503.15748,
of which the straight-through estimator is the limit; BinaryRelax, Yin et al. 2018,
arXiv:1801.06313), with projections as seldom as C-steps are. A C-step also takes u back to one step
beyond the outermost values (as BinaryConnect clips, Courbariaux et al. 2015, arXiv:1511.00363):
nothing else would stop what has a value's sign for good from running away, and the mean of a cell,
which is its value, would follow the few that run furthest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_condensa.functional.masks import numbers
from lightning_condensa.functional.norms import norm
from lightning_condensa.functional.placement import like, local, parts
from lightning_condensa.functional.ranks import Ranks
from lightning_condensa.lc.effects import Effects
from lightning_condensa.lc.engine import Engine, Parameters
from lightning_condensa.lc.importance import Importance
from lightning_condensa.schemes import BoundScheme, Encoding
from lightning_condensa.schemes.bound import boundaries_of, bounded

#: Names of optimizers' state in torch.
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


class Proximal(Engine):
    """L-C with a proximal penalty.

    Buffers, each of the parameter's size and type: factors for a pruned parameter, the offset for
    one that is rounded, and in the last steps before a C-step the squared gradients (for
    ``criterion="taylor"`` one number per group).

    Args:
        prune_rate: Share of a pruned weight that a step removes.
        importance: Exponent of the gradient in the metric of the C-step; 0 for plain magnitude.
    """

    def __init__(self, prune_rate: float, importance: float) -> None:
        self._prune_rate = prune_rate
        self._importance = Importance(importance)
        self._effects = Effects()
        self._fixed = False
        self._stray: bool | None = None  # whether the optimizers move what is pruned, once known
        self._factors: dict[str, Tensor] = {}
        self._boundaries: dict[str, Tensor] = {}
        self._offsets: dict[str, Tensor] = {}
        # From a C-step to the L-step that it begins.
        self._next_offsets: dict[str, Tensor] = {}
        self._moves: dict[str, Tensor] = {}
        self._limited: dict[str, Encoding] = {}

    @property
    def cuts(self) -> bool:
        """Whether what is pruned is out of training: at a rate of 1, and in the fine-tune phase."""
        return self._prune_rate == 1

    @torch.no_grad()
    def before_step(self, parameters: Parameters, only: Collection[int] | None) -> None:
        """Zero the gradients of weights that are pruned for good."""
        if self.cuts:
            trained = {
                n: parameters[n].grad
                for n in self._factors
                if parameters[n].grad is not None and (only is None or id(parameters[n]) in only)
            }
            self._scale(trained)

    @torch.no_grad()
    def after_step(self, parameters: Parameters) -> None:
        """The proximal step. With most optimizers what is pruned for good is zero already."""
        if not self.cuts or self._stray:
            self._scale({n: parameters[n].detach() for n in self._factors})

    @torch.no_grad()
    def latent(self, weights: Parameters) -> dict[str, Tensor]:
        """Weights with u in the place of w."""
        offsets = {n: like(o, weights[n]) for n, o in self._offsets.items()}
        return {**weights, **{n: weights[n].detach() - o for n, o in offsets.items()}}

    def observe(
        self, bound: BoundScheme, parameters: Parameters, only: Collection[int] | None
    ) -> None:
        """Sum squared gradients for the metric of the next C-step, while there is a choice."""
        if self._fixed:
            return
        if self._importance.exponent > 0:
            self._importance.observe(parameters, only)
        self._effects.observe(bound, parameters, only)

    @torch.no_grad()
    def c_step(
        self,
        parameters: Parameters,
        bound: BoundScheme,
        strength: float,
        rounding: float,
        optimizers: Iterable[Optimizer],
    ) -> dict[str, Encoding]:
        """θ ← Π(w) in the metric of the gradients, or on the support once that is fixed."""
        if self.cuts and not self._stray:
            self._watch(parameters)
        latent = self.latent(parameters)
        if self._fixed:
            theta = self.project(latent, bound)
        else:
            metric = self._importance.weigh(parameters)
            theta = bound.pi(latent, metric, self._effects.take(), self._boundaries)
            support = {n: local(e.mask) for n, e in theta.items() if e.mask is not None}
            self._keep(support, parameters)
        if self._fixed or not bound.prunes:
            self._boundaries = boundaries_of(theta)
        values = {n: local(theta[n].decode()) for n in dict.fromkeys((*bound.moved, *bound.latent))}
        start = {n: local(latent[n].detach()) for n in values}
        goals = values | self._goals_before_rounding(latent, bound)
        self._moves = {n: (goals[n] - start[n]).mul_(strength) for n in bound.moved}
        start |= {n: start[n] + move for n, move in self._moves.items()}
        self._limited = {n: theta[n] for n in bound.latent}
        self._next_offsets = {
            n: (values[n] - local(bounded(theta[n], like(start[n], latent[n])))).mul_(rounding)
            for n in bound.latent
        }
        return theta

    def _goals_before_rounding(self, latent: Parameters, bound: BoundScheme) -> dict[str, Tensor]:
        """Where latent weights go that are moved before they are rounded."""
        both = set(bound.moved) & set(bound.latent)
        if not both:
            return {}
        theta = self.project(latent, bound.direct)
        return {name: local(theta[name].decode()) for name in both}

    @torch.no_grad()
    def enter_l_step(
        self, parameters: Parameters, optimizers: Iterable[Optimizer], fixed_support: bool
    ) -> None:
        """Cut what is pruned for good out of weights and optimizers; set others on their way."""
        for name, offset in self._offsets.items():  # w is u, until it gets its new offset
            local(parameters[name].detach()).sub_(offset)
        if fixed_support and not self._fixed:
            self._fixed, self._prune_rate = True, 1.0
            self._keep({n: f == 1 for n, f in self._factors.items()}, parameters)
            if self._stray is None:  # no C-step may come that could tell
                self._stray = True
        if self.cuts:
            self._cut(parameters, optimizers)
        for name, move in self._moves.items():
            local(parameters[name].detach()).add_(move)
        for name, theta in self._limited.items():
            weight = parameters[name].detach()
            local(weight).copy_(local(bounded(theta, weight)))
        for name, offset in self._next_offsets.items():
            if name in self._factors:  # only what is kept
                offset.mul_(self._factors[name] == 1)
            local(parameters[name].detach()).add_(offset)
        self._offsets, self._next_offsets, self._moves = self._next_offsets, {}, {}
        self._limited = {}

    @torch.no_grad()
    def project(self, parameters: Parameters, bound: BoundScheme) -> dict[str, Encoding]:
        """Π(w); on the support once that is fixed."""
        if not self._fixed:
            return bound.pi(parameters, boundaries=self._boundaries)
        masks = {n: like(f == 1, parameters[n]) for n, f in self._factors.items()}
        return bound.pi_on_support(parameters, masks, self._boundaries)

    def state_dict(self, parameters: Parameters) -> dict[str, Any]:
        """Supports, offsets, rates, and the gradients that were seen."""
        p = parameters
        return {
            "prune_rate": self._prune_rate,
            "fixed": self._fixed,
            "stray": self._stray,
            "support": {n: like(f == 1, p[n]) for n, f in self._factors.items()},
            "offsets": {n: like(o, p[n]) for n, o in self._offsets.items()},
            "boundaries": self._boundaries,
            "importance": self._importance.state_dict(p),
            "effects": self._effects.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], parameters: Parameters) -> None:
        """Take up what :meth:`state_dict` gave, on the parameters' devices."""
        self._prune_rate = state["prune_rate"]
        self._fixed, self._stray = state["fixed"], state["stray"]
        self._keep(parts(state["support"], parameters), parameters)
        self._offsets = parts(state["offsets"], parameters)
        self._boundaries = dict(state["boundaries"])
        self._importance.load_state_dict(state["importance"], parameters)
        self._effects.load_state_dict(state["effects"], parameters)

    def _keep(self, support: Mapping[str, Tensor], parameters: Parameters) -> None:
        """Set the factors of a proximal step: 1 on the support, 1 − rate elsewhere."""
        # Multiplying by a number of the weight's own type is several times faster than by a bool.
        self._factors = {}
        for name, mask in support.items():
            dtype = parameters[name].dtype
            if self.cuts:
                self._factors[name] = numbers(mask, dtype)
            else:
                rate = max(self._prune_rate, torch.finfo(dtype).eps)  # 1 − rate must not round to 1
                self._factors[name] = torch.where(mask, 1.0, 1 - rate).to(dtype)

    def _watch(self, parameters: Parameters) -> None:
        """See whether pruned weights have left zero since they were cut.

        Optimizers that treat each element on its own leave them there; those that mix elements
        (LBFGS, Muon) or have state that cannot be cut (8-bit moments) do not.
        """
        weights = {n: (local(parameters[n].detach()), f) for n, f in self._factors.items()}
        left = any(norm([torch.addcmul(w, w, f, value=-1)]) > 0 for w, f in weights.values())
        pruned = any(f.numel() > 0 and bool(f.amin() == 0) for f in self._factors.values())
        strayed, known = Ranks.holding(list(parameters.values())).totals([left, pruned])
        if strayed or known:
            self._stray = strayed > 0

    def _cut(self, parameters: Parameters, optimizers: Iterable[Optimizer]) -> None:
        """Zero pruned weights, and what optimizers remember of them: momentum would move them.

        State is numbers of the shape of their parameter; anything else (a step counter, a factored
        or an 8-bit moment) is left alone. So are second moments, which move nothing by themselves:
        on a CPU Adam's square root is several times slower on zeros.
        """
        self._scale({n: parameters[n].detach() for n in self._factors})
        for optimizer in optimizers:
            for name, factor in self._factors.items():
                parameter = parameters[name]
                for key, value in optimizer.state.get(parameter, {}).items():
                    if key not in _SECOND_MOMENTS and _like_weights(value, parameter):
                        local(value).mul_(factor)

    def _scale(self, tensors: Mapping[str, Tensor | None]) -> None:
        parts = [local(t) for t in tensors.values() if t is not None]
        if parts:
            torch._foreach_mul_(parts, [self._factors[n] for n in tensors])


def _like_weights(value: object, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor):
        return False
    return value.shape == parameter.shape and value.is_floating_point()
