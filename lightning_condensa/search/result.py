"""What a search found, and the evidence."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table

from lightning_condensa.deploy.atomic import write_atomically
from lightning_condensa.objectives import Direction
from lightning_condensa.search import fronts, summary
from lightning_condensa.search.goal import Goal
from lightning_condensa.search.report import to_html
from lightning_condensa.search.rescoring import Rescored, rescore
from lightning_condensa.search.scores import PerSample
from lightning_condensa.search.trial import Mode
from lightning_condensa.search.trials import Baseline, Curve, ObjectiveInfo, State, Trial, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Baseline", "Curve", "ObjectiveInfo", "SearchResult", "State", "Trial", "show"]


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search and the best feasible one.

    Attributes:
        baseline: The uncompressed model.
        trials: Every trial that ended, in order.
        level: The metric to keep: the baseline's less the tolerance; ``None`` in a budget.
        target: The metric that shows by itself that a trial is feasible: the level, with the margin
            that the asked confidence needs; ``None`` in a budget.
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
        budget: What the objective may come to, where that was asked for instead of a level.
        objectives: All objectives, the first one of which ``objective``, ``direction`` and ``unit``
            are of.
    """

    baseline: Baseline
    trials: tuple[Trial, ...]
    level: float | None
    target: float | None
    metric: str
    mode: Mode
    objective: str
    direction: Direction
    unit: str
    curve: Curve | None
    scheme: str = ""
    confidence: float | None = None
    rescored: Rescored | None = None
    budget: float | None = None
    objectives: tuple[ObjectiveInfo, ...] = ()

    @property
    def several(self) -> bool:
        """Whether a front of several objectives was sought."""
        return len(self.objectives) > 1

    @property
    def best(self) -> Trial | None:
        """The evaluated feasible trial with the best objective, in a budget with the best metric.

        Under several objectives it is the :attr:`knee`. ``None`` if none is feasible.
        """
        return self.best_of(self.trials)

    def best_of(self, trials: Sequence[Trial]) -> Trial | None:
        """The best of some of the trials; ``None`` if none of them is feasible."""
        if self.several:
            return fronts.knee(self, trials)
        if self.budget is None:
            feasible = [t for t in trials if t.state == "feasible" and t.eligible]
            return _best(feasible, self.direction)
        # An aborted trial left a model, too, with the metric that it has.
        kept = [
            t
            for t in trials
            if t.state in ("feasible", "aborted") and t.eligible and t.evidence is not None
        ]
        return self.best_metric(kept)

    def best_metric(self, trials: Sequence[Trial]) -> Trial | None:
        """The one of some trials, all with a metric, that has the best."""
        sign = 1 if self.mode == "max" else -1
        return max(trials, key=lambda t: sign * (t.evidence or 0.0), default=None)

    @property
    def knee(self) -> Trial | None:
        """The trial where the front of several objectives bends most.

        That is farthest beyond the line (or plane) through the front's ends, on logarithmic scales.
        ``None`` if no trial is feasible.

        Raises:
            ValueError: If there is one objective.
        """
        self._need_several("knee")
        return fronts.knee(self, self.trials)

    @property
    def hypervolume(self) -> list[float]:
        """Hypervolume of the feasible trials under several objectives, after each trial.

        It begins at the dense model, on scales of logarithms of "times better": twice as good in
        both of two objectives is ``ln(2)²``.

        Raises:
            ValueError: If there is one objective.
        """
        self._need_several("hypervolume")
        return fronts.hypervolumes(self)

    def pick(self, **budgets: float) -> Trial | None:
        """The best trial of the front within budgets of some objectives.

        Of several objectives, those without a budget decide, by the product of how many times they
        are better; where all have one, all do. With one objective the metric decides.

        Args:
            **budgets: What an objective may come to, by its name (``MemoryFootprint=1e6``) or its
                short one (``memory=1e6``).

        Returns:
            The trial; ``None`` where none is within the budgets.

        Raises:
            ValueError: If a name is none of the objectives'.
        """
        return fronts.pick(self, budgets)

    def _need_several(self, name: str) -> None:
        if not self.several:
            raise ValueError(f"{name} needs a search with several objectives, got {self.objective}")

    @property
    def nearest_miss(self) -> Trial | None:
        """The evaluated trial whose metric comes nearest to the level from below.

        In a budget the one whose objective comes nearest to it.
        """
        if self.budget is not None:
            goal = Goal(self.mode, self.direction, budget=self.budget)
            over = [t for t in self.trials if t.metric is not None and not goal.within(t.objective)]
            return _best(over, self.direction)
        sign = 1 if self.mode == "max" else -1
        missed = [
            t
            for t in self.trials
            if t.state in ("infeasible", "aborted") and t.fidelity == 1 and t.evidence is not None
        ]
        return max(missed, key=lambda t: sign * (t.evidence or 0.0), default=None)

    @property
    def pareto(self) -> list[Trial]:
        """The trials that no other beats in metric and objective at once, best objective first.

        Under several objectives: the feasible ones that no other feasible one beats in all of them.
        """
        if self.several:
            return fronts.front(self, self.trials)
        scored = [
            t
            for t in self.trials
            if t.fidelity == 1 and t.metric is not None and t.objective is not None
        ]
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
        return summary.table(self)

    def ratio(self, trial: Trial) -> float:
        """How many times better the trial's objective is than the dense model's."""
        if not trial.objective or not self.baseline.objective:
            return math.nan
        ratio = self.baseline.objective / trial.objective
        return ratio if self.direction == "min" else 1 / ratio

    def summary(self) -> str:
        """The outcome in a sentence."""
        return summary.summary(self)

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


def _best(trials: Sequence[Trial], direction: Direction) -> Trial | None:
    known = [t for t in trials if t.objective is not None]
    sign = 1 if direction == "max" else -1
    return max(known, key=lambda t: sign * (t.objective or 0.0), default=None)


def _gain(a: float | None, b: float | None, direction: Direction) -> float:
    assert a is not None and b is not None
    return a - b if direction == "max" else b - a
