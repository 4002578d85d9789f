"""The noise of trials, from the scores of single samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from toy import loaders, search, toy

from lightning_condensa import Prune, Range
from lightning_condensa.functional.paired import paired_variance
from lightning_condensa.search.metrics import noise_variance
from lightning_condensa.search.noise import Noise, NoiseModel, expected_noise
from lightning_condensa.search.recorder import ScoreRecorder
from lightning_condensa.search.scores import SCORES_FILE, Scores

SAMPLES = 500


class Classifier(pl.LightningModule):
    """Two blobs per class; returns nothing from validation, but calls ``self(x)``."""

    def __init__(self, returns: str = "", calls: str = "self") -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 3))
        self.returns, self.calls = returns, calls

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        logits = self(x) if self.calls == "self" else self.network(x)
        loss = functional.cross_entropy(logits, y, reduction="none")
        right = (logits.argmax(1) == y).float()
        self.log_dict(
            {"val_acc": right.mean(), "val_loss": loss.mean(), "val_scaled": 100 * right.mean()},
            batch_size=len(y),
        )
        return {
            "": None,
            "logits": {"logits": logits, "target": y},
            "scores": {"val_acc": right, "val_loss": loss},
        }[self.returns]

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 10, generator=draw)
    return x, (x[:, :3] + 0.1 * torch.randn(count, 3, generator=draw)).argmax(1)


def data(shuffle: bool = False) -> dict[str, Any]:
    x, y = samples(1500)
    held = TensorDataset(x[:SAMPLES], y[:SAMPLES])
    return {
        "train_dataloaders": DataLoader(TensorDataset(x[SAMPLES:], y[SAMPLES:]), batch_size=50),
        "val_dataloaders": DataLoader(held, batch_size=64, shuffle=shuffle),
    }


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Classifier()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    pl.Trainer(max_epochs=4, **quiet).fit(model, data()["train_dataloaders"])
    return model.state_dict()


def dense(trained: dict[str, Tensor], **arguments: Any) -> Classifier:
    model = Classifier(**arguments)
    model.load_state_dict(trained)
    return model


def run(tmp_path: Path, model: Classifier, shuffle: bool = False, **changes: Any) -> Any:
    trainer = {"max_epochs": 1, "accelerator": "cpu"}
    given = {"max_trials": 2, "trainer": trainer, "dirpath": tmp_path, **changes}
    return search(given.pop("dirpath"), **given).fit(model, **data(shuffle))


def own_scores(model: Classifier, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    if x is None or y is None:
        x, y = data()["val_dataloaders"].dataset.tensors
    with torch.no_grad():
        return (model(x).argmax(1) == y).float()


@pytest.mark.parametrize(
    ("arguments", "changes", "kind"),
    [
        ({}, {}, "accuracy"),
        ({"calls": "network", "returns": "logits"}, {}, "accuracy"),
        ({"calls": "network", "returns": "scores"}, {}, "val_acc"),
        (
            {"calls": "network", "returns": "logits"},
            {"per_sample": lambda o, b: (o["logits"].argmax(1) == b[1]).float()},
            "per_sample",
        ),
    ],
)
def test_trials_are_paired_with_the_dense_model(
    tmp_path: Path, trained: dict[str, Tensor], arguments: Any, changes: Any, kind: str
) -> None:
    model = dense(trained, **arguments)
    result = run(tmp_path, model, **changes)
    reference = own_scores(model)
    assert float(reference.mean()) == pytest.approx(result.baseline.metric)
    assert Scores.load(tmp_path / "baseline" / SCORES_FILE).kind == kind
    for trial in result.trials:
        assert trial.basis == "paired"
        stored = Scores.load(trial.directory / SCORES_FILE)
        scores = own_scores(trial.load(dense(trained)))
        assert torch.equal(stored.values, scores) and stored.kind == kind
        assert float(scores.mean()) == pytest.approx(trial.metric)
        assert trial.variance == pytest.approx(paired_variance(scores, reference))
    assert (tmp_path / "baseline" / SCORES_FILE).stat().st_size < 2 * SAMPLES
    assert not model._forward_hooks
    best = result.best
    assert f"sd {best.variance**0.5:.2g}, paired with the dense model on 500" in result.summary()
    study = optuna.load_study(study_name="condensa", storage=f"sqlite:///{tmp_path}/study.db")
    facts = study.trials[best.number].user_attrs
    assert facts["basis"] == "paired" and facts["variance"] == best.variance


def test_models_that_agree_are_compared_more_exactly_than_by_counting(
    tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    found = []
    for name, scheme in (("near", Prune(Range(0.8, 0.9))), ("far", Prune(Range(0.004, 0.006)))):
        result = run(tmp_path / name, dense(trained), scheme=scheme, max_trials=1)
        binomial = noise_variance(result.baseline.metric, SAMPLES, 0.05)
        assert result.baseline.variance == binomial
        found += result.trials
    near, far = found
    # What it claims to be: the variance over validation sets.
    x, y = samples(200 * SAMPLES, seed=1)
    for trial in found:
        difference = own_scores(trial.load(dense(trained)), x, y) - own_scores(dense(trained), x, y)
        over_sets = float(difference.view(200, SAMPLES).mean(1).var())
        assert trial.variance == pytest.approx(over_sets, rel=0.35)
    assert abs(near.metric - result.baseline.metric) < 0.02 and near.variance < binomial
    assert far.metric < result.baseline.metric - 0.2 and far.variance > binomial


def test_a_loss_is_paired_too(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    result = run(tmp_path, dense(trained), metric="val_loss", mode="min")
    assert result.baseline.basis == "spread"
    assert [t.basis for t in result.trials] == ["paired", "paired"]
    x, y = data()["val_dataloaders"].dataset.tensors

    def losses(model: Classifier) -> Tensor:
        with torch.no_grad():
            return functional.cross_entropy(model(x), y, reduction="none")

    reference = losses(dense(trained))
    assert result.baseline.variance == pytest.approx(float(reference.var()) / SAMPLES / 2, rel=1e-4)
    trial = result.trials[0]
    expected = paired_variance(losses(trial.load(dense(trained))), reference)
    assert trial.variance == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "changes", "reason"),
    [
        ({"calls": "network"}, {}, "returns no scores, and calls no self"),
        ({}, {"metric": "val_scaled", "tolerance": 5}, "no mean of scores is the logged val_sca"),
        ({}, {"per_sample": lambda o, b: torch.zeros(len(b[1]))}, "no mean of scores is the"),
        ({}, {"shuffle": True}, "other samples, or in another order"),
    ],
)
def test_what_cannot_be_paired_is_counted_and_says_why(
    tmp_path: Path,
    trained: dict[str, Tensor],
    capsys: pytest.CaptureFixture[str],
    arguments: Any,
    changes: Any,
    reason: str,
) -> None:
    result = run(tmp_path, dense(trained, **arguments), progress=True, **changes)
    basis = "assumed" if changes.get("metric") else "binomial"
    assert [t.basis for t in result.trials] == [basis, basis]
    assert all(t.variance == result.baseline.variance for t in result.trials)
    assert result.baseline.basis in result.summary()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(f"noise is {basis}, not paired with the dense model") == 1
    assert reason in said


def test_a_given_noise_needs_no_scores(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    result = run(tmp_path, dense(trained), metric_std=0.01)
    assert [t.basis for t in result.trials] == ["given", "given"]
    assert all(t.variance == pytest.approx(1e-4) for t in result.trials)
    assert not list(tmp_path.rglob(SCORES_FILE))
    assert "noise sd 0.01, as given" in result.summary()
    later = run(tmp_path, dense(trained))  # finished, and now without
    assert [t.basis for t in later.trials] == ["binomial", "binomial"]


@pytest.mark.slow
def test_a_resumed_search_judges_each_trial_by_its_own_noise(
    tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    first = run(tmp_path, dense(trained), tolerance=0.1, max_trials=3)
    sure = run(tmp_path, dense(trained), tolerance=0.1, max_trials=3, confidence=0.95)
    for before, after in zip(first.trials, sure.trials, strict=True):
        assert (before.metric, before.variance) == (after.metric, after.variance)
        assert after.basis == "paired"
        margin = after.metric - 1.6448536 * math.sqrt(after.variance) - sure.level
        assert after.state == ("feasible" if margin >= 0 else "infeasible")
    nearest = min(sure.trials, key=lambda t: abs(t.metric - sure.level))
    assert sure.target == pytest.approx(sure.level + 1.6448536 * nearest.variance**0.5)
    given = run(tmp_path, dense(trained), tolerance=0.1, max_trials=3, metric_std=0.02)
    assert all(t.variance == pytest.approx(4e-4) for t in given.trials)


def test_per_sample_is_checked(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"per_sample must be a callable .* got 3"):
        search(tmp_path, per_sample=3)
    with pytest.raises(ValueError, match=r"per_sample must return a tensor of shape \[n\], got"):
        run(tmp_path, dense(trained), per_sample=lambda o, b: torch.zeros(2, 2))


def test_validation_leaves_no_hook(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    model, recorder = dense(trained), ScoreRecorder(tmp_path / SCORES_FILE, "val_acc")
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[recorder])
    trainer.validate(model, data()["val_dataloaders"], verbose=False)
    assert not model._forward_hooks
    assert torch.equal(Scores.load(tmp_path / SCORES_FILE).values, own_scores(model))


def test_an_interrupted_step_leaves_no_hook(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    class Broken(Classifier):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            raise RuntimeError("broken")

    model = Broken()
    recorder = ScoreRecorder(tmp_path / SCORES_FILE, "val_acc")
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[recorder])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.validate(model, data()["val_dataloaders"], verbose=False)
    assert not model._forward_hooks and not (tmp_path / SCORES_FILE).exists()


def test_scores_survive_a_file(tmp_path: Path) -> None:
    sums = torch.tensor([1.5, -2.0], dtype=torch.float64)
    for values in (torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.25, 3.0])):
        Scores(values, sums, "kind").save(tmp_path / "a" / SCORES_FILE)
        found = Scores.load(tmp_path / "a" / SCORES_FILE)
        assert torch.equal(found.values, values) and torch.equal(found.batches, sums)
        assert (found.kind, found.reason) == ("kind", "")
    Scores.none("why").save(tmp_path / SCORES_FILE)
    assert Scores.load(tmp_path / SCORES_FILE).reason == "why"
    assert "there is no" in Scores.load(tmp_path / "elsewhere").reason


def test_the_dense_model_beside_itself_keeps_a_floor(tmp_path: Path) -> None:
    same = Scores(torch.ones(100), torch.zeros(1, dtype=torch.float64), "accuracy")
    same.save(tmp_path / SCORES_FILE)
    noise = NoiseModel(Noise(1e-3, "binomial"), same, print).of(tmp_path)
    assert noise.basis == "paired" and noise.variance == pytest.approx(1e-4)
    assert expected_noise(3.0, 100, 0.1, scores=same).basis == "assumed"


def test_a_module_that_tells_nothing_of_its_samples_is_searched_as_before(tmp_path: Path) -> None:
    result = search(tmp_path, max_trials=2).fit(toy(), **loaders())
    assert {t.basis for t in result.trials} == {"binomial"}
    expected = noise_variance(0.95, 1000, 0.05)
    assert all(t.variance == pytest.approx(expected) for t in result.trials)


class Synced(Classifier):
    """Logs the accuracy of all processes."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean(), sync_dist=True)


@pytest.mark.slow
def test_two_processes_put_their_scores_together(
    tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    two = {"max_epochs": 1, "accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn"}
    model = Synced()
    model.load_state_dict(trained)
    result = run(tmp_path, model, trainer=two, max_trials=1)
    (trial,) = result.trials
    assert trial.basis == "paired"
    # Samples are dealt out in turn, and one process's stand after the other's.
    order = torch.cat([torch.arange(0, SAMPLES, 2), torch.arange(1, SAMPLES, 2)])
    reference, scores = own_scores(dense(trained)), own_scores(trial.load(dense(trained)))
    assert torch.equal(Scores.load(tmp_path / "baseline" / SCORES_FILE).values, reference[order])
    assert torch.equal(Scores.load(trial.directory / SCORES_FILE).values, scores[order])
    assert trial.variance == pytest.approx(paired_variance(scores, reference))
