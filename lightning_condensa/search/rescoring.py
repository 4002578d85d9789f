"""The dense model and a trial's, on data that the search never saw."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from lightning_condensa.functional.paired import paired_variance
from lightning_condensa.search.goal import Goal
from lightning_condensa.search.metrics import Stage, count_samples, evaluate
from lightning_condensa.search.noise import Basis, Noise, expected_noise, noise_text, unpaired
from lightning_condensa.search.recorder import ScoreRecorder
from lightning_condensa.search.scores import SCORES_FILE, PerSample, Scores
from lightning_condensa.search.trial import make_trainer

if TYPE_CHECKING:
    from lightning_condensa.search.result import SearchResult, Trial


@dataclass(frozen=True)
class Rescored:
    """What the dense model and a trial's model score on untouched data.

    Attributes:
        number: The trial.
        metric: Name of the metric.
        dense: The dense model's.
        compressed: The trial's.
        samples: How many; ``None`` where the loader does not know.
        variance: Of the difference.
        basis: From what that is known.
        probability: That the difference is truly within the tolerance, by these data alone: no
            trial was chosen by them, so nothing has to be corrected for luck. ``None`` without a
            tolerance.
    """

    number: int
    metric: str
    dense: float
    compressed: float
    samples: int | None
    variance: float
    basis: Basis
    probability: float | None

    def __str__(self) -> str:
        kept = ""
        if self.probability is not None:
            kept = f"within the tolerance with probability {self.probability:.2f}, "
        return (
            f"On untouched data {self.metric} is {self.compressed:.4f} (dense: {self.dense:.4f}); "
            f"{kept}noise {noise_text(self.variance, self.basis, self.samples)}."
        )


def rescore(
    result: SearchResult,
    trial: Trial,
    model: pl.LightningModule,
    dataloaders: Any,
    datamodule: pl.LightningDataModule | None,
    metric: str | None,
    trainer: Mapping[str, Any],
    per_sample: PerSample | None,
) -> Rescored:
    """Score both models once; see :meth:`SearchResult.rescore`."""
    if not isinstance(model, pl.LightningModule):
        raise ValueError(f"model must be a LightningModule, got {type(model).__name__}")
    if (dataloaders is None) == (datamodule is None):
        raise ValueError(
            "rescore needs dataloaders or a datamodule, one of them; "
            f"got dataloaders={dataloaders!r}, datamodule={datamodule!r}"
        )
    name = result.metric if metric is None else metric
    stage: Stage = "validate" if name == result.metric else "test"
    arguments = _arguments(stage, dataloaders, datamodule)
    compressed = trial.load(deepcopy(model))
    with tempfile.TemporaryDirectory() as folder:
        values, scores, samples = [], [], None
        for role, module in (("dense", deepcopy(model)), ("compressed", compressed)):
            path = Path(folder) / role
            runner = make_trainer({**trainer, "logger": False}, path)
            recorder = ScoreRecorder(path / SCORES_FILE, name, per_sample)
            values.append(evaluate(runner, module, arguments, name, recorder, stage)[name])
            scores.append(Scores.load(path / SCORES_FILE))
            loaders = runner.test_dataloaders if stage == "test" else runner.val_dataloaders
            samples = count_samples(loaders)
    tolerance = None if result.level is None else abs(result.baseline.metric - result.level)
    if unpaired(scores[1], scores[0]):
        goal = Goal(result.mode, result.direction, tolerance, result.budget)
        noise = expected_noise(values[0], samples, goal.small(values[0]), scores=scores[0])
    else:
        noise = Noise(paired_variance(scores[1].values, scores[0].values), "paired")
    if tolerance is None:
        return Rescored(trial.number, name, values[0], values[1], samples, *noise, None)
    kept = tolerance + (values[1] - values[0]) * (1 if result.mode == "max" else -1)
    probability = NormalDist(kept, max(noise.variance, 1e-18) ** 0.5).cdf(0)
    return Rescored(trial.number, name, values[0], values[1], samples, *noise, 1 - probability)


def _arguments(
    stage: Stage, dataloaders: Any, datamodule: pl.LightningDataModule | None
) -> dict[str, Any]:
    if datamodule is None:
        return {"dataloaders": dataloaders}
    if stage == "test":
        return {"datamodule": datamodule}
    # Trainer.validate would ask for its validation data.
    datamodule.prepare_data()
    datamodule.setup("test")
    return {"dataloaders": datamodule.test_dataloader()}
