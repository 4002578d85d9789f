"""The winner, on data that the search never saw."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from toy import Toy, loaders, search

from lightning_condensa import load_compressed
from lightning_condensa.functional.paired import paired_variance
from lightning_condensa.search import SearchResult


class Tested(Toy):
    """Tells in ``test_step`` which samples have more than a threshold."""

    def test_step(self, batch: tuple[Tensor], batch_idx: int) -> dict[str, Tensor]:
        right = (self.layer(batch[0]).abs().mean(1) > 0.3).float()
        self.log("test_acc", right.mean())
        return {"test_acc": right}

    def right(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return (self.layer(x).abs().mean(1) > 0.3).float()


class Held(pl.LightningDataModule):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.stages = x, []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)

    def val_dataloader(self) -> Any:
        raise AssertionError("the validation data are not asked for")

    def test_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.x), batch_size=64)


@pytest.fixture(scope="module")
def model() -> Tested:
    torch.manual_seed(0)
    return Tested()


@pytest.fixture(scope="module")
def found(model: Tested, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return search(tmp_path_factory.mktemp("run"), max_trials=4).fit(model, **loaders())


@pytest.fixture(scope="module")
def held() -> Tensor:
    return torch.randn(300, 100, generator=torch.Generator().manual_seed(7))


CPU = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.mark.parametrize("by", ["dataloaders", "datamodule"])
def test_both_models_are_tested_once(
    found: SearchResult, model: Tested, held: Tensor, by: str
) -> None:
    module = Held(held)
    given = {"datamodule": module} if by == "datamodule" else {}
    given = given or {"dataloaders": module.test_dataloader()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = found.rescore(model, **given, metric="test_acc", trainer=CPU)
    again = result.rescored
    dense, sparse = model.right(held), found.best.load(Tested()).right(held)
    assert again.number == found.best.number and again.samples == 300
    assert again.dense == pytest.approx(float(dense.mean()))
    assert again.compressed == pytest.approx(float(sparse.mean())) != again.dense
    assert again.basis == "paired"
    assert again.variance == pytest.approx(paired_variance(sparse, dense))
    z = (0.05 + again.compressed - again.dense) / again.variance**0.5
    assert again.probability == pytest.approx(NormalDist().cdf(z), abs=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # Shown, and not used.
    assert replace(result, rescored=None) == found and result.best is found.best


def test_by_default_the_searchs_metric_comes_from_the_test_data(
    found: SearchResult, model: Tested, held: Tensor
) -> None:
    module = Held(held)
    again = found.rescore(model, datamodule=module, trainer=CPU).rescored
    assert module.stages == ["test"] and again.metric == "val_acc"
    assert again.dense == pytest.approx(found.baseline.metric)
    assert again.compressed == pytest.approx(found.best.metric)
    assert again.basis == "binomial" and again.samples == 300


def test_summary_table_page_and_json_show_it(
    found: SearchResult, model: Tested, held: Tensor, tmp_path: Path
) -> None:
    result = found.rescore(model, Held(held).test_dataloader(), metric="test_acc", trainer=CPU)
    again = result.rescored
    text = f"On untouched data test_acc is {again.compressed:.4f} (dense: {again.dense:.4f})"
    assert text in result.summary() and text not in found.summary()
    assert text[:40] in " ".join(str(result).split())
    assert text in result.to_html()
    folder = result.save(tmp_path)
    record = json.loads((folder / "result.json").read_text())
    assert record["rescored"]["compressed"] == again.compressed
    assert record["best"] == found.best.number
    kept = load_compressed(folder / "best.condensa", Tested())
    assert torch.equal(kept.layer.weight, found.best.load(Tested()).layer.weight)


def test_bad_calls_are_refused(found: SearchResult, model: Tested, held: Tensor) -> None:
    loader = Held(held).test_dataloader()
    with pytest.raises(ValueError, match="dataloaders or a datamodule, one of them"):
        found.rescore(model)
    with pytest.raises(ValueError, match="one of them"):
        found.rescore(model, loader, Held(held))
    with pytest.raises(ValueError, match="metric='test_f1' is not logged by Tested in test"):
        found.rescore(model, loader, metric="test_f1", trainer=CPU)
    with pytest.raises(ValueError, match="model must be a LightningModule, got Linear"):
        found.rescore(model.layer, loader)
    nothing = replace(found, trials=())
    with pytest.raises(ValueError, match="no trial is feasible"):
        nothing.rescore(model, loader)
