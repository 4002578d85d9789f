"""What a search found, and the evidence."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_condensa.deploy import load_compressed
from lightning_condensa.deploy.atomic import write_atomically
from lightning_condensa.objectives import Direction
from lightning_condensa.search.noise import Basis, Noise, noise_text
from lightning_condensa.search.report import to_html
from lightning_condensa.search.rescoring import Rescored, rescore
from lightning_condensa.search.scores import PerSample
from lightning_condensa.search.trial import MODEL_FILE, Mode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

M = TypeVar("M", bound=nn.Module)
State = Literal["feasible", "infeasible", "aborted", "diverged", "failed"]


@dataclass(frozen=True)
class Baseline:
    """The uncompressed model.

    Attributes:
        metric: Its metric on the validation data.
        variance: Variance of a metric measured there.
        objective: Its objective.
        samples: Validation samples; ``None`` where the loader does not know.
        basis: From what the variance is known.
    """

    metric: float
    variance: float
    objective: float
    samples: int | None
    basis: Basis = "binomial"

    @property
    def noise(self) -> Noise:
        """Of a metric measured there."""
        return Noise(self.variance, self.basis)


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
        objective: Objective of the compressed model; for a diverged trial that of its structure.
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
        if not self.runs:
            return self.state
        confirmed = "confirmed" if self.state == "feasible" else "not confirmed"
        mean = "a run diverged" if self.evidence is None else f"mean {self.evidence:.4f}"
        return f"{self.state}, {confirmed}: {mean} of {1 + len(self.runs)} runs"

    parent: int | None = None
    curve: Sequence[Sequence[float]] = ()
    bound: float | None = None

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


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search and the best feasible one.

    Attributes:
        baseline: The uncompressed model.
        trials: Every trial that ended, in order.
        level: The metric to keep: the baseline's less the tolerance.
        target: The metric that shows by itself that a trial is feasible: the level, with the margin
            that the asked confidence needs.
        confidence: The probability with which a trial must be feasible to count as such; ``None``
            where its measured metric decides.
        metric: Name of the metric.
        mode: Its direction.
        objective: Name of the objective.
        direction: Its direction.
        unit: Its unit.
        curve: The surrogate along the dimension; ``None`` for several dimensions.
        scheme: The searched scheme as YAML, with its dimensions; empty where it is not known.
        rescored: What came out on untouched data, where :meth:`rescore` was called.
    """

    baseline: Baseline
    trials: tuple[Trial, ...]
    level: float
    target: float
    metric: str
    mode: Mode
    objective: str
    direction: Direction
    unit: str
    curve: Curve | None
    scheme: str = ""
    confidence: float | None = None
    rescored: Rescored | None = None

    @property
    def best(self) -> Trial | None:
        """The evaluated feasible trial with the best objective; ``None`` if none is feasible."""
        feasible = [t for t in self.trials if t.state == "feasible" and t.confirms is None]
        return _best(feasible, self.direction)

    @property
    def nearest_miss(self) -> Trial | None:
        """The evaluated trial whose metric comes nearest to the level from below."""
        sign = 1 if self.mode == "max" else -1
        missed = [
            t
            for t in self.trials
            if t.state in ("infeasible", "aborted") and t.evidence is not None
        ]
        return max(missed, key=lambda t: sign * (t.evidence or 0.0), default=None)

    @property
    def pareto(self) -> list[Trial]:
        """The trials that no other beats in metric and objective at once, best objective first."""
        scored = [t for t in self.trials if t.metric is not None and t.objective is not None]
        front = [t for t in scored if not any(self._dominates(other, t) for other in scored)]
        return sorted(front, key=lambda t: t.objective or 0.0, reverse=self.direction == "max")

    def _dominates(self, a: Trial, b: Trial) -> bool:
        better = [
            _gain(a.metric, b.metric, self.mode),
            _gain(a.objective, b.objective, self.direction),
        ]
        return min(better) >= 0 and max(better) > 0

    def rescore(
        self,
        model: pl.LightningModule,
        dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        *,
        metric: str | None = None,
        trainer: Mapping[str, Any] | None = None,
        per_sample: PerSample | None = None,
    ) -> SearchResult:
        """Score the dense model and the best once on data that the search never saw.

        The choice of the best is not touched by it: to choose again after having looked would
        make these data part of the search.

        Args:
            model: The module that the search started from; left as it is.
            dataloaders: As for ``Trainer.test``.
            datamodule: Instead of loaders: its ``test_dataloader``.
            metric: A metric that the module logs in ``test_step``, such as ``"test_acc"``. By
                default the search's own, from ``validation_step`` on these data.
            trainer: Keyword arguments of the Trainer, as for the search.
            per_sample: As for the search.

        Returns:
            The result with :attr:`rescored`, which its summary and report tell of.

        Raises:
            ValueError: If no trial is feasible, or the data or metric do not fit.
        """
        if self.best is None:
            raise ValueError("there is nothing to rescore: no trial is feasible")
        found = rescore(
            self, self.best, model, dataloaders, datamodule, metric, trainer or {}, per_sample
        )
        return replace(self, rescored=found)

    def table(self) -> Table:
        """The trials as a Rich table."""
        table = Table(
            title=f"{self.objective} with {self._requirement()}",
            title_justify="left",
            caption=None if self.rescored is None else str(self.rescored),
            caption_justify="left",
        )
        names = list(self.trials[0].values) if self.trials else []
        for column in ("trial", *names, self.metric, f"{self.objective} [{self.unit}]", "× dense"):
            table.add_column(column, justify="right")
        table.add_column("P(feasible)", justify="right")
        table.add_column("state")
        table.add_column("time", justify="right")
        table.add_column("from", justify="right")
        for trial in self.trials:
            table.add_row(
                str(trial.number),
                *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in trial.values.values()),
                "" if trial.metric is None else f"{trial.metric:.4f}",
                "" if trial.objective is None else f"{trial.objective:,.5g}",
                "" if not trial.objective else f"{self.ratio(trial):.3g}",
                "" if trial.probability is None else f"{trial.probability:.2f}",
                f"{trial.standing} {trial.message}"[:60].strip(),
                f"{trial.seconds:.0f} s",
                "dense" if trial.parent is None else str(trial.parent),
                style="bold green" if trial == self.best else None,
            )
        return table

    def _requirement(self) -> str:
        sign = "≥" if self.mode == "max" else "≤"
        sure = "" if self.confidence is None else f" with probability {self.confidence:g}"
        return f"{self.metric} {sign} {self.level:.4f}{sure} (dense: {self.baseline.metric:.4f})"

    def ratio(self, trial: Trial) -> float:
        """How many times better the trial's objective is than the dense model's."""
        if not trial.objective or not self.baseline.objective:
            return math.nan
        ratio = self.baseline.objective / trial.objective
        return ratio if self.direction == "min" else 1 / ratio

    def summary(self) -> str:
        """The outcome in a sentence."""
        best = self.best
        if best is not None:
            return (
                f"Trial {best.number} is best: {show(best.values)}; "
                f"{self.objective} {best.objective:,.5g} "
                f"{self.unit} ({self.ratio(best):.1f} × better than dense) at {self.metric} "
                f"{best.metric:.4f}, of {self._requirement()}{self._sure(best)}"
                f"{self._confirmed(best)}.{'' if self.rescored is None else f' {self.rescored}'}"
            )
        text = f"No trial is feasible: none of {len(self.trials)} has {self._requirement()}."
        miss = self.nearest_miss
        if miss is not None:
            text += (
                f" Nearest miss: trial {miss.number} with {self.metric} {miss.evidence:.4f} at "
                f"{show(miss.values)}; widen the range, train longer, or raise the tolerance."
            )
        return text

    def _confirmed(self, best: Trial) -> str:
        if best.runs:
            return f"; confirmed by another run, mean {self.metric} {best.evidence:.4f}"
        if any(t.confirms is not None for t in self.trials):
            return "; not confirmed: the runs for that were spent on trials that did not hold"
        return ""

    def _sure(self, trial: Trial) -> str:
        if trial.probability is None:
            return ""
        noise = noise_text(trial.variance, trial.basis, self.baseline.samples)
        return f"; feasible with probability {trial.probability:.2f}, its metric's noise {noise}"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self.table())
        console.print(self.summary())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the models, as plain data."""
        trials = [{**asdict(t), "directory": str(t.directory)} for t in self.trials]
        best = None if self.best is None else self.best.number
        return {**asdict(self), "trials": trials, "best": best}

    def plot(self) -> Figure:
        """Metric against compression with the surrogate's band, and the objective so far.

        Raises:
            ModuleNotFoundError: Without matplotlib.
        """
        from lightning_condensa.plots import plot_search

        return plot_search(self)

    def to_html(self) -> str:
        """A page with the outcome, settings, figures, trials and the best model's tensors.

        It refers to nothing outside itself. Without matplotlib it has no figures.
        """
        return to_html(self)

    def save(self, directory: str | Path) -> Path:
        """Write ``result.json``, ``report.html``, ``search.png`` and the best model.

        The model is ``best.condensa``; there is none where no trial is feasible.

        Args:
            directory: Created where it is missing.

        Returns:
            The directory.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target / "result.json", json.dumps(self.to_dict(), indent=1).encode())
        if self.best is not None:
            shutil.copyfile(self.best.path, target / "best.condensa")
        write_atomically(target / "report.html", self.to_html().encode())
        self.plot().savefig(target / "search.png", dpi=120)
        return target


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


def _best(trials: Sequence[Trial], direction: Direction) -> Trial | None:
    known = [t for t in trials if t.objective is not None]
    sign = 1 if direction == "max" else -1
    return max(known, key=lambda t: sign * (t.objective or 0.0), default=None)


def _gain(a: float | None, b: float | None, direction: Direction) -> float:
    assert a is not None and b is not None
    return a - b if direction == "max" else b - a
