"""One L-C run as a state machine over optimizer steps, in plain torch.

The owner of the training loop calls :meth:`LCRun.before_step` when gradients are ready and
:meth:`LCRun.after_step` when the optimizer has stepped; the rest follows from the plan.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_condensa.lc.lagrangian import Lagrangian
from lightning_condensa.lc.response import OptimizerResponse
from lightning_condensa.lc.schedules import Plan
from lightning_condensa.lc.support import Support
from lightning_condensa.schemes import BoundScheme, Encoded


@dataclass(frozen=True)
class CStep:
    """What a C-step did, for logs.

    Attributes:
        theta: The new θ.
        mu: μ of the L-step that begins.
        gap: ‖w − Δ(θ)‖ / ‖Δ(θ)‖.
        seconds: Wall-clock time.
        gradient_ratio: ‖penalty gradient‖ / ‖loss gradient‖ in the last optimizer step before;
            ``None`` without a penalty.
    """

    theta: Mapping[str, Encoded]
    mu: float
    gap: float
    seconds: float
    gradient_ratio: float | None


class LCRun:
    """θ, λ, μ and the position in a plan.

    Args:
        bound: The scheme, resolved against the network.
        plan: The run in numbers.
        parameters: The live parameters called ``bound.names``; changed in place by optimizer
            steps, and by the run where fine-tuning starts.

    Attributes:
        step: Optimizer steps so far.
        gaps: Relative gap of each parameter at the end of the L-C phase.
    """

    def __init__(self, bound: BoundScheme, plan: Plan, parameters: Mapping[str, Tensor]) -> None:
        self.bound = bound
        self.plan = plan
        self.parameters = dict(parameters)
        self.step = 0
        self.gaps: dict[str, float] = {}
        self._next_c_step = 0
        # Of the last C-step. A resumed run may have another plan, so they are not looked up in it.
        self._c_step_at = 0
        self._progress = 0.0
        self._lagrangian: Lagrangian | None = None
        self._support: Support | None = None
        self._response = OptimizerResponse()
        self._gradient_ratio: float | None = None

    @property
    def finetuning(self) -> bool:
        """Whether only the support is trained by now."""
        return self._support is not None

    def start(self) -> CStep:
        """The C-step before training."""
        c_step = self._advance([])
        assert c_step is not None
        return c_step

    def before_step(self, optimizer: Optimizer, only_its_own: bool) -> None:
        """Add the penalty's gradient, or mask the gradients while fine-tuning.

        Args:
            optimizer: The one about to step.
            only_its_own: Whether other optimizers step with gradients of their own.
        """
        if self._support is not None:
            self._support.mask_gradients(self.parameters)
            return
        assert self._lagrangian is not None
        if not self.plan.absolute_mu:
            self._response.before_step(optimizer, self.parameters)
        only = None
        if only_its_own:
            only = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self.step + 1 == self._due_at:
            # Norms make the device wait, so they are taken once per L-step.
            self._gradient_ratio = self._lagrangian.gradient_ratio(self.parameters)
        self._lagrangian.add_penalty_gradient(self.parameters, only)

    def after_step(self, optimizers: Sequence[Optimizer]) -> CStep | None:
        """Count an optimizer step; make the C-step that is due after it, if one is.

        Args:
            optimizers: All that train the network.
        """
        self.step += 1
        if self._support is not None:
            # Momentum from before the fine-tune may have moved a pruned weight.
            self._support.apply(self.parameters)
            return None
        assert self._lagrangian is not None
        if not self.plan.absolute_mu and self._response.after_step(self.parameters):
            # The first step was free of a penalty, to measure the optimizer.
            self._lagrangian.set_mu(self._mu(self._next_c_step - 1))
        return self._advance(optimizers)

    def project(self, weights: Mapping[str, Tensor]) -> dict[str, Encoded]:
        """θ under the final scheme, as it would be deployed now.

        In the L-C phase it is the last C-step's, brought to the final density while the ramp is
        still under way: once λ has moved, Π(w − λ/μ) means something only at the end of the next
        L-step. Later it is the projection of ``weights``.
        """
        if self._lagrangian is None:
            return self.bound.pi(weights)
        theta = self._lagrangian.theta
        if self._progress >= 1:
            return dict(theta)
        return self.bound.pi({name: encoded.decode() for name, encoded in theta.items()})

    def finish(self) -> dict[str, Encoded]:
        """θ at the end of training; an L-step that was cut short ends with a projection."""
        if self._lagrangian is not None and self.step > self._c_step_at:
            return self.bound.pi(self._lagrangian.shifted(self.parameters))
        return self.project(self.parameters)

    def relative_gaps(self, theta: Mapping[str, Encoded]) -> dict[str, float]:
        """‖w − Δ(θ)‖ / ‖Δ(θ)‖ of each parameter."""
        gaps = {}
        for name, encoded in theta.items():
            decoded = encoded.decode()
            norm = decoded.norm().clamp_min(torch.finfo(decoded.dtype).tiny)
            gaps[name] = float(torch.dist(self.parameters[name].detach(), decoded) / norm)
        return gaps

    @property
    def _due_at(self) -> int | None:
        c_steps = self.plan.c_steps
        return c_steps[self._next_c_step] if self._next_c_step < len(c_steps) else None

    def _mu(self, index: int) -> float:
        unit = 1.0 if self.plan.absolute_mu else self._response.mu_of_unit_rate
        return self.plan.mu[index] * unit

    def _advance(self, optimizers: Sequence[Optimizer]) -> CStep | None:
        c_step = None
        if self._due_at is not None and self.step >= self._due_at:
            c_step = self._c_step(optimizers)
        if self.step >= self.plan.finetune_from and not self.gaps:
            self._enter_finetune()
        return c_step

    def _c_step(self, optimizers: Sequence[Optimizer]) -> CStep:
        started = time.perf_counter()
        index = self._next_c_step
        self._c_step_at, self._progress = self.step, self.plan.progress[index]
        bound = self.bound.relaxed(self._progress)
        if self._lagrangian is None:
            self._lagrangian = Lagrangian(bound.pi(self.parameters))
            self._lagrangian.set_mu(self._mu(index))
        else:
            self._lagrangian.c_step(
                self.parameters,
                bound,
                self._mu(index),
                self.plan.dual_step[index],
                self._untrained(optimizers),
            )
            if self.plan.reset_optimizer:
                for optimizer in optimizers:
                    optimizer.state.clear()
        self._next_c_step += 1
        return CStep(
            theta=self._lagrangian.theta,
            mu=self._lagrangian.mu,
            gap=self._lagrangian.gap(self.parameters),
            seconds=time.perf_counter() - started,
            gradient_ratio=self._gradient_ratio,
        )

    def _untrained(self, optimizers: Sequence[Optimizer]) -> set[str]:
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        trained = {id(p) for group in groups for p in group["params"] if p.requires_grad}
        return {name for name, p in self.parameters.items() if id(p) not in trained}

    def _enter_finetune(self) -> None:
        """From here on only what the scheme keeps is trained, from θ's values."""
        theta = self.project(self.parameters)
        self.gaps = self.relative_gaps(theta)
        support = Support.of(theta)
        if not support.masks:
            return  # nothing was pruned: the penalty goes on to hold w near its rounded values
        with torch.no_grad():
            for name, encoded in theta.items():
                self.parameters[name].copy_(encoded.decode())
        self._support = support
        self._lagrangian = None

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-identical continuation needs, except the parameters."""
        return {
            "step": self.step,
            "gaps": self.gaps,
            "next_c_step": self._next_c_step,
            "c_step_at": self._c_step_at,
            "progress": self._progress,
            "response": self._response.state_dict(),
            "lagrangian": None if self._lagrangian is None else self._lagrangian.state_dict(),
            "masks": None if self._support is None else self._support.masks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, on the parameters' devices."""
        self.step = state["step"]
        self.gaps = dict(state["gaps"])
        self._next_c_step = min(state["next_c_step"], len(self.plan.c_steps))
        self._c_step_at = state["c_step_at"]
        self._progress = state["progress"]
        self._response = OptimizerResponse.from_state(state["response"])
        if state["masks"] is not None:
            self._lagrangian = None
            self._support = Support(
                {n: m.to(self.parameters[n].device) for n, m in state["masks"].items()}
            )
        else:
            self._lagrangian = Lagrangian(
                {n: Encoded.dense(p.detach()) for n, p in self.parameters.items()}
            )
            self._lagrangian.load_state_dict(state["lagrangian"])
