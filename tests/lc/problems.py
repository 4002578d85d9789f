"""Problems small enough to know the answer, and a plain training loop around an L-C run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_condensa import Scheme
from lightning_condensa.lc import CStep, LCRun, Schedule


class Problem:
    """Least squares ``‖Xw − y‖²/n`` for a w with ``k`` non-zeros."""

    def __init__(self, seed: int = 0, n: int = 200, d: int = 20, k: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, d, generator=generator)
        self.truth = torch.zeros(1, d)
        support = torch.randperm(d, generator=generator)[:k]
        signs = torch.randint(0, 2, (k,), generator=generator) * 2.0 - 1
        self.truth[0, support] = signs * (0.5 + torch.rand(k, generator=generator))
        noise = 0.05 * torch.randn(n, 1, generator=generator)
        self.y = self.x @ self.truth.T + noise
        torch.manual_seed(seed)
        self.network = nn.Linear(d, 1, bias=False)
        self.k = k

    def loss(self, weight: Tensor | None = None) -> Tensor:
        weight = self.network.weight if weight is None else weight
        return (self.x @ weight.T - self.y).square().mean()

    def least_squares_on_truth(self) -> float:
        columns = self.truth[0] != 0
        solution = torch.linalg.lstsq(self.x[:, columns], self.y).solution
        weight = torch.zeros_like(self.truth)
        weight[0, columns] = solution[:, 0]
        return float(self.loss(weight))


class Classes:
    """Four classes of points, and a network of two convolutions and two linear layers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 2, 8, generator=generator).to(dtype)
        self.y = self.x.mean(2).float() @ torch.randn(2, 4, generator=generator)
        self.y = self.y.argmax(1)
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv1d(2, 8, 3),
            nn.ReLU(),
            nn.Conv1d(8, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 16),
            nn.ReLU(),
            nn.Linear(16, 4),
        ).to(dtype)

    def loss(self) -> Tensor:
        return functional.cross_entropy(self.network(self.x).float(), self.y)


@dataclass
class Training:
    """A training loop around an L-C run.

    Attributes:
        problem: Has a ``network`` and a ``loss()``.
        scheme: The scheme.
        schedule: The schedule.
        optimizer: Of the network.
        steps: Optimizer steps.
        spoil: Called with each step's number after the backward pass; true skips the optimizer.
        c_steps: The C-steps so far.
    """

    problem: Problem | Classes
    scheme: Scheme
    schedule: Schedule
    optimizer: torch.optim.Optimizer
    steps: int
    spoil: Callable[[int], bool] = lambda step: False
    c_steps: list[CStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bound = self.scheme.bind(self.problem.network)
        self.plan = self.schedule.plan(
            self.steps, prunes=self.bound.prunes, projects=self.bound.projects
        )
        self.run = self.new_run()

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The compressed parameters."""
        return dict(self.problem.network.named_parameters())

    def new_run(self) -> LCRun:
        """A run that has not started."""
        return LCRun(self.bound, self.plan, {n: self.weights[n] for n in self.bound.names})

    def start(self) -> None:
        """The C-step before training."""
        self.c_steps.append(self.run.start())

    def backward(self) -> None:
        """New gradients."""
        self.optimizer.zero_grad()
        self.problem.loss().backward()

    def step(self) -> CStep | None:
        """One optimizer step and what follows it."""
        self.backward()
        skip = self.spoil(self.run.step)
        self.run.before_step(self.optimizer, only_its_own=False)
        if not skip:
            self.optimizer.step()
        c_step = self.run.after_step([self.optimizer])
        if c_step is not None:
            self.c_steps.append(c_step)
        return c_step

    def all(self) -> Iterator[CStep | None]:
        """All steps, one after the other, from the C-step before them."""
        self.start()
        while self.run.step < self.steps:
            yield self.step()

    def finish(self) -> dict[str, Tensor]:
        """Train to the end; the deployed weights."""
        for _ in self.all():
            pass
        return self.bound.delta(self.run.finish())
