"""What a search knows of the dense model and of each compression that it tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

from torch import nn

from lightning_condensa.deploy import load_compressed
from lightning_condensa.objectives import Direction
from lightning_condensa.search.noise import Basis, Noise
from lightning_condensa.search.trial import MODEL_FILE

M = TypeVar("M", bound=nn.Module)
State = Literal["feasible", "infeasible", "aborted", "diverged", "failed"]


@dataclass(frozen=True)
class Baseline:
    """The uncompressed model.

    Attributes:
        metric: Its metric on the validation data.
        variance: Variance of a metric measured there.
        objective: Its objective, the first one of several.
        samples: Validation samples; ``None`` where the loader does not know.
        basis: From what the variance is known.
        objectives: All objectives by name.
    """

    metric: float
    variance: float
    objective: float
    samples: int | None
    basis: Basis = "binomial"
    objectives: Mapping[str, float] = field(default_factory=dict)

    @property
    def noise(self) -> Noise:
        """Of a metric measured there."""
        return Noise(self.variance, self.basis)


@dataclass(frozen=True)
class ObjectiveInfo:
    """An objective, as a result tells of it.

    Attributes:
        name: Its name.
        direction: Whether less or more of it is better.
        unit: Its unit.
        short: Other names that it goes by.
    """

    name: str
    direction: Direction
    unit: str = ""
    short: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One evaluated compression.

    Attributes:
        number: Its number in the study.
        values: The scheme's dimensions.
        state: ``"feasible"``, ``"infeasible"``, ``"aborted"`` (it could no longer become
            feasible; metric and model are the best until then), ``"diverged"`` or ``"failed"``.
        metric: Metric of the compressed model; ``None`` where there is none.
        variance: Variance of the metric's distance to the dense model's.
        objective: Objective of the compressed model, the first one of several; for a diverged
            trial that of its structure.
        details: The objective's details.
        metrics: Everything that validation logged.
        steps: Optimizer steps.
        seconds: Wall-clock time.
        message: The error of a diverged or failed trial.
        directory: Where its logs and packed model are.
        started: When it was handed out, in seconds since 1970; ``None`` where it is not known.
        probability: How sure it is, after all trials, that the model truly keeps the level: its
            measured metric is drawn towards what the others make one expect of it. ``None`` while
            the search runs.
        basis: From what the variance is known.
        confirms: The trial of which it is another run; such a run is evidence, and never the best.
        runs: Metrics of further runs of the trial, with other seeds; ``None`` of one that diverged.
            Together with the trial's own they decide whether it is feasible.
        parent: The trial whose model it started from; ``None`` for the uncompressed one.
        curve: ``(progress, metric)`` of the validations in training.
        bound: What the metric of an aborted trial would have stayed short of.
        objectives: All objectives of the compressed model by name; empty for a diverged trial.
        fidelity: Share of the training that it was given, of the shortened one where it started
            from another trial's model; one with less than 1 is evidence, and never the best.
    """

    number: int
    values: dict[str, Any]
    state: State
    metric: float | None
    variance: float
    objective: float | None
    details: dict[str, Any]
    metrics: dict[str, float]
    steps: int
    seconds: float
    message: str
    directory: Path
    started: float | None = None
    probability: float | None = None
    basis: Basis = "binomial"
    confirms: int | None = None
    runs: tuple[float | None, ...] = ()
    parent: int | None = None
    curve: Sequence[Sequence[float]] = ()
    bound: float | None = None
    objectives: Mapping[str, float] = field(default_factory=dict)
    fidelity: float = 1.0

    @property
    def eligible(self) -> bool:
        """Whether it can be the best: of all of the training, and no run of another trial."""
        return self.fidelity == 1 and self.confirms is None

    @property
    def evidence(self) -> float | None:
        """Mean metric of all runs; ``None`` where one has none."""
        known = [m for m in (self.metric, *self.runs) if m is not None]
        return fmean(known) if len(known) == 1 + len(self.runs) else None

    @property
    def standing(self) -> str:
        """The state, and what further runs have to do with it."""
        if self.confirms is not None:
            return f"{self.state}, another run of trial {self.confirms}"
        if self.fidelity < 1:
            return f"{self.state} after {self.fidelity:.0%} of the training"
        if not self.runs:
            return self.state
        confirmed = "confirmed" if self.state == "feasible" else "not confirmed"
        mean = "a run diverged" if self.evidence is None else f"mean {self.evidence:.4f}"
        return f"{self.state}, {confirmed}: {mean} of {1 + len(self.runs)} runs"

    @property
    def path(self) -> Path:
        """The packed model."""
        return self.directory / MODEL_FILE

    def load(self, module: M) -> M:
        """Load the trial's compressed model into a module of its class, in place."""
        return load_compressed(self.path, module)


@dataclass(frozen=True)
class Curve:
    """What the search believes of the metric along one dimension, for plots.

    Attributes:
        dimension: Name of the dimension.
        values: Its values.
        center: Believed metric.
        lower: Lower end of the 95 % band.
        upper: Upper end.
    """

    dimension: str
    values: list[float]
    center: list[float]
    lower: list[float]
    upper: list[float]


def show(values: Mapping[str, Any]) -> str:
    """Values of a scheme's dimensions for people.

    Example:
        >>> show({"prune.density": 0.0123456, "quantize.dtype": "int8"})
        'prune.density = 0.01235, quantize.dtype = int8'
    """
    return ", ".join(
        f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}"
        for name, value in values.items()
    )
