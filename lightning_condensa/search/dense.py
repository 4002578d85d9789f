"""What a search measures of the uncompressed model, once, and keeps in the study."""

from __future__ import annotations

import hashlib
import math
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_condensa.deploy import CompressedModel
from lightning_condensa.objectives import Objective, Several
from lightning_condensa.search.metrics import count_samples, evaluate
from lightning_condensa.search.noise import expected_noise
from lightning_condensa.search.scores import SCORES_FILE, Scores
from lightning_condensa.search.sensitivity import Sensitivity
from lightning_condensa.search.store import Store
from lightning_condensa.search.trial import Data, make_trainer
from lightning_condensa.search.trials import Baseline

if TYPE_CHECKING:
    from lightning_condensa.search.condensa_search import CondensaSearch


class DenseModel:
    """The starting point of a search, measured where the study does not know it yet.

    Args:
        search: The search's settings.
        store: Its study.
        model: The module; left as it is.
        data: The data.
    """

    def __init__(
        self, search: CondensaSearch, store: Store, model: pl.LightningModule, data: Data
    ) -> None:
        self._search, self._store, self._model, self._data = search, store, model, data
        self._directory = search.dirpath / "baseline"

    def baseline(self) -> Baseline:
        """Its metric, with the noise to be expected, and its objective.

        Raises:
            ValueError: If the metric is not logged, or not finite.
        """
        search = self._search
        known = self._store.get("baseline")
        if known is None:
            module = deepcopy(self._model)
            trainer = make_trainer({**search.trainer, "logger": False}, self._directory)
            recorder = search.recorder(self._directory)
            arguments = self._data.validate_arguments()
            metric = evaluate(trainer, module, arguments, search.metric, recorder)[search.metric]
            if not math.isfinite(metric):
                raise ValueError(f"the dense model's {search.metric} is {metric}: nothing to keep")
            known = {
                "metric": metric,
                "samples": count_samples(trainer.val_dataloaders),
                **_objectives(search.objective, CompressedModel(module, {}, search.space.scheme)),
            }
            self._store.set("baseline", known)
        noise = expected_noise(
            known["metric"],
            known["samples"],
            search.goal.small(known["metric"]),
            search.metric_std,
            self.scores(),
        )
        return Baseline(
            known["metric"],
            noise.variance,
            known["objective"],
            known["samples"],
            noise.basis,
            known.get("objectives", {search.objective.name: known["objective"]}),
        )

    def scores(self) -> Scores | None:
        """The scores of its samples; ``None`` where the noise is given."""
        if self._search.metric_std is not None:
            return None
        return Scores.load(self._directory / SCORES_FILE)

    def sensitivity(self) -> Sensitivity:
        """What the metric loses without training, one dimension at a time."""
        known = self._store.get("sensitivity")
        if known is not None:
            return Sensitivity.from_dict(known)
        search = self._search

        def measure(module: pl.LightningModule) -> float:
            trainer = make_trainer({**search.trainer, "logger": False}, self._directory)
            arguments = self._data.validate_arguments()
            return evaluate(trainer, module, arguments, search.metric)[search.metric]

        found = Sensitivity.scan(search.space, self._model, measure)
        self._store.set("sensitivity", found.to_dict())
        return found


def _objectives(objective: Objective, dense: CompressedModel) -> dict[str, Any]:
    if not isinstance(objective, Several):
        return {"objective": objective(dense)}
    found = {part.name: part(dense) for part in objective.parts}
    return {"objective": found[objective.parts[0].name], "objectives": found}


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's state, to tell whether two searches start from the same weights."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(
                value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            )
    return digest.hexdigest()
