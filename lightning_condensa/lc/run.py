"""One L-C run as a state machine over optimizer steps, in plain torch.

The owner of the training loop calls :meth:`LCRun.before_step` when gradients are ready and
:meth:`LCRun.after_step` when the optimizer has stepped; the rest follows from the plan.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_condensa.functional.norms import norm, relative
from lightning_condensa.functional.placement import placed
from lightning_condensa.functional.ranks import count_nonzero
from lightning_condensa.lc.augmented import Augmented
from lightning_condensa.lc.engine import Engine
from lightning_condensa.lc.plan import Plan
from lightning_condensa.lc.proximal import Proximal
from lightning_condensa.schemes import BoundScheme, Encoded, Encoding

#: No learning rate rises as if the network were sparser than this.
_LEAST_DENSITY = 1e-4


@dataclass(frozen=True)
class CStep:
    """What a C-step did, for logs.

    Attributes:
        theta: The new θ.
        density: Non-zero values in θ for each element of the weights.
        value_bytes: Of the surviving values and their scales, the paper's count.
        strength: Of the penalty in the L-step that begins: μ; or how far values are on the way to
            what the scheme makes of them.
        gap: ‖w − Δ(θ)‖ / ‖Δ(θ)‖, with w as the L-step left it.
        lr_factor: On the learning rate of the optimizer steps that follow.
        seconds: Wall-clock time.
        gradient_ratio: ‖penalty gradient‖ / ‖loss gradient‖ in the last optimizer step before;
            ``None`` without a gradient of the penalty.
    """

    theta: Mapping[str, Encoding]
    density: float
    value_bytes: float
    strength: float
    gap: float
    lr_factor: float
    seconds: float
    gradient_ratio: float | None = None


class LCRun:
    """θ, the penalty and the position in a plan.

    Weights that are sparse already, those of a finished run at a higher density say, are a warm
    start: the ramp begins at the density that they have, on the support that they have.

    Args:
        bound: The scheme, resolved against the network.
        plan: The run in numbers.
        parameters: The live parameters called ``bound.names``; changed in place by optimizer
            steps, and by the run after them.

    Attributes:
        step: Optimizer steps so far.
        finetuning: Whether only the support is trained by now.
        gaps: Relative gap of each parameter at the end of the L-C phase; empty before.
        density: Share of non-zeros that the last C-step left of what the scheme prunes.
    """

    def __init__(self, bound: BoundScheme, plan: Plan, parameters: Mapping[str, Tensor]) -> None:
        self.bound = bound
        self.plan = plan
        self.parameters = dict(parameters)
        self.step = 0
        self.finetuning = False
        self.gaps: dict[str, float] = {}
        self.density = 1.0
        self._next_c_step = 0
        self._progress = 0.0
        self._head_start = 0.0
        self._engine: Engine = (
            Proximal(plan.prune_rate, plan.importance) if plan.proximal else Augmented()
        )

    @property
    def lr_factor(self) -> float:
        """Factor on the learning rate of the optimizer steps until the next C-step."""
        if not self._engine.cuts:
            return 1.0
        return math.pow(max(self.density, _LEAST_DENSITY), -self.plan.lr_exponent)

    def start(self) -> CStep:
        """The C-step before training."""
        self._head_start = self._way_made()
        c_step = self._advance([])
        assert c_step is not None
        return c_step

    def before_step(self, optimizer: Optimizer, only_its_own: bool) -> None:
        """Prepare the gradients: add the penalty's, or zero those of pruned weights.

        Args:
            optimizer: The one about to step.
            only_its_own: Whether other optimizers step with gradients of their own.
        """
        for parameter in self.parameters.values():
            # Where a parameter is whole but activations are sharded, its gradient is a partial sum.
            if isinstance(parameter.grad, DTensor):
                parameter.grad = placed(parameter.grad, parameter)
        only = None
        if only_its_own:
            only = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self._due_at is not None and self._due_at - self.step <= self.plan.window:
            self._engine.observe(self.bound, self.parameters, only)
        self._engine.before_step(self.parameters, only)

    def after_step(self, optimizers: Sequence[Optimizer]) -> CStep | None:
        """Count an optimizer step; make the C-step that is due after it, if one is.

        Args:
            optimizers: All that train the network.
        """
        self.step += 1
        self._engine.after_step(self.parameters)
        return self._advance(optimizers)

    def project(self, weights: Mapping[str, Tensor]) -> dict[str, Encoding]:
        """θ of some weights under the final scheme; also while the ramp lasts.

        Args:
            weights: Those to deploy: an average, or :meth:`latent` of the ones that train.
        """
        theta = self._engine.project(weights, self.bound)
        if self._progress < 1 and not self.plan.proximal:
            return self.bound.pi({name: encoded.decode() for name, encoded in theta.items()})
        return theta

    def latent(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that train, as C-steps see them.

        Args:
            weights: Those that the network computes with.
        """
        return self._engine.latent(weights)

    def finish(self, averaged: bool = False) -> dict[str, Encoding]:
        """θ at the end of training.

        Args:
            averaged: Whether the parameters hold an average instead of what trained.
        """
        weights = self.parameters if averaged else self.latent(self.parameters)
        return self._engine.finish(weights, self.bound)

    def relative_gaps(self, theta: Mapping[str, Encoding]) -> dict[str, float]:
        """‖w − Δ(θ)‖ / ‖Δ(θ)‖ of each parameter."""
        gaps = {}
        for name, encoded in theta.items():
            decoded = encoded.decode()
            distance = norm([self.parameters[name].detach() - decoded])
            gaps[name] = relative(distance, norm([decoded]))
        return gaps

    @property
    def _due_at(self) -> int | None:
        c_steps = self.plan.c_steps
        return c_steps[self._next_c_step] if self._next_c_step < len(c_steps) else None

    def _advance(self, optimizers: Sequence[Optimizer]) -> CStep | None:
        if self._due_at is None or self.step < self._due_at:
            return None
        started = time.perf_counter()
        index = self._next_c_step
        progress = self._head_start + (1 - self._head_start) * self.plan.progress[index]
        self._progress = max(self._progress, progress)  # where a resumed run became longer
        bound, strength = self.bound.relaxed(self._progress), self.plan.strength[index]
        rounding = (self.plan.rounding or self.plan.strength)[index]
        theta = self._engine.c_step(self.parameters, bound, strength, rounding, optimizers)
        leaves = {n: e.leaves for n, e in theta.items()}
        kept = _nonzeros(leaves)
        self.density = _density(theta, kept, [n for n, e in theta.items() if e.mask is not None])
        bits = sum(
            leaf.bits_of(k) for n in leaves for leaf, k in zip(leaves[n], kept[n], strict=True)
        )
        c_step = CStep(
            theta=theta,
            density=_density(theta, kept, theta),
            value_bytes=bits / 8,
            strength=rounding if bound.latent else strength,
            gap=self._gap(theta),
            lr_factor=self.lr_factor,
            seconds=time.perf_counter() - started,
            gradient_ratio=self._engine.gradient_ratio,
        )
        self._next_c_step += 1
        if self.step >= self.plan.l_end and not self.gaps:
            self.gaps = self.relative_gaps(theta)
        self.finetuning = self.plan.finetune_from is not None and (
            self.step >= self.plan.finetune_from
        )
        self._engine.enter_l_step(self.parameters, optimizers, fixed_support=self.finetuning)
        if self.plan.reset_optimizer and self.step > 0:
            for optimizer in optimizers:
                optimizer.state.clear()
        return c_step

    def _way_made(self) -> float:
        """How far the weights are on the way from dense to the scheme's density."""
        if not self.bound.prunes:
            return 0.0
        theta = self.bound.pi(self.parameters)
        # Biases, and β of norms, are often zero before any training.
        pruned = [
            n for n in self.bound.pruned if theta[n].mask is not None and len(theta[n].shape) > 1
        ]
        total = sum(theta[n].numel for n in pruned)
        zeros = total - sum(count_nonzero([self.parameters[n].detach() for n in pruned]))
        kept = _nonzeros({n: theta[n].leaves for n in pruned})
        to_prune = total - sum(map(sum, kept.values()))
        return min(zeros / to_prune, 1.0) if to_prune > 0 else 1.0

    def _gap(self, theta: Mapping[str, Encoding]) -> float:
        decoded = {n: e.decode() for n, e in theta.items()}
        distance = norm(self.parameters[n].detach() - d for n, d in decoded.items())
        return relative(distance, norm(decoded.values()))

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-identical continuation needs, except the parameters."""
        return {
            "step": self.step,
            "finetuning": self.finetuning,
            "gaps": self.gaps,
            "density": self.density,
            "progress": self._progress,
            "head_start": self._head_start,
            "engine": self._engine.state_dict(self.parameters),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, on the parameters' devices."""
        self.step = state["step"]
        self.finetuning = state["finetuning"]
        self.gaps = dict(state["gaps"])
        self.density = state["density"]
        self._next_c_step = bisect_right(self.plan.c_steps, self.step)
        if self.plan.finetune_from is not None and not self.finetuning:
            # A plan that became shorter may have its last C-step, which fixes the support, behind.
            self._next_c_step = min(self._next_c_step, len(self.plan.c_steps) - 1)
        self._progress = state["progress"]
        self._head_start = state["head_start"]
        self._engine.load_state_dict(state["engine"], self.parameters)


def _nonzeros(leaves: Mapping[str, Sequence[Encoded]]) -> dict[str, list[int]]:
    """Non-zero codes of each leaf of each parameter; one collective call for all of them."""
    counts = iter(count_nonzero([e.codes for own in leaves.values() for e in own]))
    return {name: [next(counts) for _ in own] for name, own in leaves.items()}


def _density(
    theta: Mapping[str, Encoding], kept: Mapping[str, Sequence[int]], names: Collection[str]
) -> float:
    """Non-zero values for each element of some tensors; 1 of none."""
    total = sum(theta[n].numel for n in names)
    return sum(sum(kept[n]) for n in names) / total if total > 0 else 1.0
