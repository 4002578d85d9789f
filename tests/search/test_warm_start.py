"""Trials that go on from a denser trial's model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import Toy, loaders, search

from lightning_condensa import Choice, Compose, Distillation, Prune, Quantize, Range
from lightning_condensa.callbacks import CondensaCallback
from lightning_condensa.search import ProcessPool, SearchResult
from lightning_condensa.search.space import SearchSpace
from lightning_condensa.search.store import Record
from lightning_condensa.search.trial import MODEL_FILE, TrialOutcome
from lightning_condensa.search.warm_start import APART, nearest_denser, shortened


class Watched(Toy):
    """Keeps what every fit starts from, and for how long, in the folder of its journal."""

    def on_fit_start(self) -> None:
        if isinstance(self.journal, Path):
            density = next(
                c.scheme.density for c in self.trainer.callbacks if isinstance(c, CondensaCallback)
            )
            start = {
                "weight": self.layer.weight.detach().clone(),
                "epochs": torch.tensor(self.trainer.max_epochs),
            }
            save_file(start, self.journal / f"{density:.12f}.safetensors")

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean() * 1e-2


def watched(folder: Path) -> Watched:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    return Watched(journal=folder)


def start_of(folder: Path, values: dict[str, Any]) -> dict[str, Tensor]:
    return load_file(folder / f"{values['density']:.12f}.safetensors")


def check_starts(result: SearchResult, dense: Watched, folder: Path, epochs: int) -> int:
    """How many trials started warm, each from exactly the model that it should."""
    warm = 0
    by_number = {t.number: t for t in result.trials}
    for trial in result.trials:
        start = start_of(folder, trial.values)
        if trial.parent is None:
            assert torch.equal(start["weight"], dense.layer.weight)
            assert start["epochs"] == epochs
            continue
        warm += 1
        parent = by_number[trial.parent]
        assert parent.values["density"] > trial.values["density"]
        assert torch.equal(start["weight"], parent.load(Toy()).layer.weight)
        assert not torch.equal(start["weight"], dense.layer.weight)
        u, origin = (-math.log(t.values["density"]) for t in (trial, parent))
        assert start["epochs"] == math.ceil(epochs * max(1 / 3, (u - origin) / u))
    return warm


def test_a_trial_starts_from_the_nearest_denser_model_and_trains_less(tmp_path: Path) -> None:
    dense = watched(tmp_path / "starts")
    settings = {"max_epochs": 12, "accelerator": "cpu"}
    result = search(tmp_path / "run", trainer=settings).fit(dense, **loaders())
    assert check_starts(result, dense, tmp_path / "starts", 12) >= 3
    for trial in result.trials:
        nearer = [
            t.number
            for t in result.trials[: trial.number]
            if math.log(t.values["density"] / trial.values["density"]) >= APART
        ]
        expected = min(nearer, key=lambda n: result.trials[n].values["density"], default=None)
        assert trial.parent == expected
        assert (trial.parent is None) == (trial.steps == 12 * 4)
    assert "from" in str(result) and ">dense<" in result.to_html()


def test_no_trial_starts_warm_where_that_is_not_wanted(tmp_path: Path) -> None:
    result = search(tmp_path, warm_start=0).fit(watched(tmp_path / "starts"), **loaders())
    assert [t.parent for t in result.trials] == [None] * 6
    assert len({t.steps for t in result.trials}) == 1


@pytest.mark.slow
def test_a_resumed_search_has_the_same_parents(tmp_path: Path) -> None:
    dense = watched(tmp_path / "starts")
    search(tmp_path / "a", max_trials=2).fit(dense, **loaders())
    resumed = search(tmp_path / "a", max_trials=5).fit(dense, **loaders())
    straight = search(tmp_path / "b", max_trials=5).fit(dense, **loaders())
    assert [t.parent for t in resumed.trials] == [t.parent for t in straight.trials]
    assert any(t.parent is not None for t in resumed.trials)
    for a, b in zip(resumed.trials, straight.trials, strict=True):
        assert torch.equal(a.load(Toy()).layer.weight, b.load(Toy()).layer.weight)


def test_a_parent_whose_file_is_gone_is_none(tmp_path: Path) -> None:
    dense = watched(tmp_path / "starts")
    first = search(tmp_path / "run", max_trials=2).fit(dense, **loaders())
    for trial in first.trials:
        trial.path.unlink()
    result = search(tmp_path / "run", max_trials=3).fit(dense, **loaders())
    assert result.trials[2].parent is None and result.trials[2].state != "failed"


def test_the_dense_model_teaches_a_trial_that_starts_warm(tmp_path: Path) -> None:
    taught: list[Tensor] = []

    class Pupil(Watched):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

        def training_step(self, batch: tuple[Tensor], batch_idx: int) -> dict[str, Tensor]:
            logits = self(batch[0])
            return {"loss": logits.square().mean() * 1e-2, "logits": logits}

        def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
            (teaching,) = [c for c in self.trainer.callbacks if isinstance(c, Distillation)]
            teacher = teaching.teacher or teaching._copy
            taught.append(teacher.layer.weight.detach().clone())

    (tmp_path / "starts").mkdir()
    torch.manual_seed(0)
    dense = Pupil(journal=tmp_path / "starts")
    lessons = {"max_epochs": 2, "accelerator": "cpu", "callbacks": [Distillation()]}
    result = search(tmp_path / "run", max_trials=4, trainer=lessons).fit(dense, **loaders())
    assert any(t.parent is not None for t in result.trials)
    assert taught and all(torch.equal(w, dense.layer.weight) for w in taught)


def record(folder: Path, number: int, status: str = "complete", **values: Any) -> Record:
    directory = folder / str(number)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MODEL_FILE).touch()
    outcome = TrialOutcome(status, metric=0.9 if status == "complete" else None)  # type: ignore[arg-type]
    return Record(number, values, outcome, str(directory), 1e-6, "binomial", None)


def test_a_parent_is_nowhere_sparser_and_was_trained_to_its_end(tmp_path: Path) -> None:
    space = SearchSpace(
        Compose([Prune(Range(0.01, 1.0, log=True)), Quantize(Choice(["float16", "int8", "int4"]))])
    )

    def made(number: int, density: float, dtype: str, status: str = "complete") -> Record:
        values = {"prune.density": density, "quantize.dtype": dtype}
        return record(tmp_path, number, status, **values)

    records = [
        made(0, 0.5, "float16"),
        made(1, 0.2, "int8"),
        made(2, 0.16, "int4"),
        made(3, 0.05, "int8"),
        made(4, 0.16, "int8", "diverged"),
        made(5, 0.2, "int8"),
        made(6, 0.16, "int8", "failed"),
        made(7, 0.12, "int8"),  # too near
    ]
    child = {"prune.density": 0.1, "quantize.dtype": "int8"}
    start = nearest_denser(space, child, records, least=0.25)
    assert start is not None and start.parent == 1  # and not its equal, 5
    assert start.share == pytest.approx(math.log(2) / math.log(10))
    assert nearest_denser(space, {**child, "prune.density": 0.6}, records, 0.25) is None
    milder = nearest_denser(space, {**child, "quantize.dtype": "float16"}, records, 0.25)
    assert milder is not None and milder.parent == 0
    (tmp_path / "1" / MODEL_FILE).unlink()
    other = nearest_denser(space, child, records, least=0.25)
    assert other is not None and other.parent == 5


@given(
    share=st.floats(0.01, 1),
    epochs=st.none() | st.integers(1, 500),
    steps=st.just(-1) | st.integers(1, 10_000),
    every=st.none() | st.integers(1, 50),
)
def test_shortened_training_is_at_least_its_share(
    share: float, epochs: int | None, steps: int, every: int | None
) -> None:
    full: dict[str, Any] = {"max_steps": steps, "precision": 32}
    if epochs is not None:
        full["max_epochs"] = epochs
    if every is not None:
        full["check_val_every_n_epoch"] = every
    short = shortened(full, share)
    assert short["precision"] == 32 and shortened(full, 1.0).items() >= full.items() - {
        ("check_val_every_n_epoch", every)
    }
    if steps != -1:
        assert share * steps <= short["max_steps"] <= min(share * steps + 1, steps)
    if epochs is not None or steps == -1:
        whole = 1000 if epochs is None else epochs
        assert share * whole <= short["max_epochs"] <= min(share * whole + 1, whole)
        assert every is None or 1 <= short["check_val_every_n_epoch"] <= short["max_epochs"]


@pytest.mark.parametrize("share", [-0.1, 1.5, "a third", True])
def test_a_share_out_of_range_is_refused(tmp_path: Path, share: object) -> None:
    with pytest.raises(ValueError, match=r"warm_start must be a share in \[0, 1\], got"):
        search(tmp_path, warm_start=share)


@pytest.mark.slow
def test_workers_load_the_parent_themselves(tmp_path: Path) -> None:
    dense = watched(tmp_path / "starts")
    with ProcessPool(2, threads=1) as pool:
        settings = {"max_epochs": 6, "accelerator": "cpu"}
        searching = search(tmp_path / "run", executor=pool, trainer=settings, max_trials=6)
        result = searching.fit(dense, **loaders())
    assert all(t.state != "failed" for t in result.trials)
    assert check_starts(result, dense, tmp_path / "starts", 6) >= 1
