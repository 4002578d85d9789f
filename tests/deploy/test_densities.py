"""What was asked of pruned parameters against what is left: in the report, as warnings, refused."""

from __future__ import annotations

import json
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_condensa import (
    BlockPrune,
    Compose,
    CompressedModel,
    CondensaCallback,
    DirectCompression,
    FilterPrune,
    HeadPrune,
    NeuronPrune,
    Prune,
    Quantize,
    Scheme,
)
from lightning_condensa.deploy.densities import Kept, PoolRow


def network(scale: float = 1.0) -> nn.Sequential:
    """Three layers, the second one scaled."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        for parameter in module[1].parameters():
            parameter.mul_(scale)
    return module


@pytest.mark.parametrize(
    ("module", "scheme", "kept", "total"),
    [
        (network(), Prune(0.25), 300, 1200),
        (network(), Compose([Prune(0.25), Quantize("float8_e4m3fn")]), 300, 1200),
        (network(), NeuronPrune(0.25), 15, 60),
        (network(), Compose([NeuronPrune(0.25), Quantize("int8")]), 15, 60),
        (network(), Compose([NeuronPrune(0.25), Quantize("float8_e4m3fn")]), 15, 60),
        (network(), NeuronPrune(0.3, criterion="min", prune_bias=False), 18, 60),
        (network(), BlockPrune(0.25, (5, 10)), 6, 24),
        (nn.ConvTranspose2d(6, 9, 2, groups=3), FilterPrune(1 / 3), 3, 9),
        (nn.MultiheadAttention(12, 4), HeadPrune(0.5), 2, 4),
    ],
)
def test_the_report_says_what_was_asked_and_what_is_left(
    module: nn.Module, scheme: Scheme, kept: int, total: int
) -> None:
    report = CompressedModel.compress(module, scheme).report()
    (pool,) = report.pools
    asked = scheme.stages[0].density  # type: ignore[attr-defined]
    assert (pool.asked, pool.kept, pool.total) == (asked, kept, total)
    assert pool.density == kept / total
    assert report.warnings == ()
    assert f"{kept:,} of {total:,} kept" in " ".join(str(report).split())
    assert json.loads(json.dumps(report.to_dict()))["pools"][0]["asked"] == asked


def test_each_pool_of_each_stage_is_listed() -> None:
    scheme = Compose(
        [NeuronPrune(0.5, overrides={"^0": 0.75}, criterion="min"), Prune(0.2, scope="layer")]
    )
    pools = CompressedModel.compress(network(), scheme).report().pools
    assert [(p.scheme, p.asked, p.kept, p.total) for p in pools] == [
        ("NeuronPrune", 0.75, 15, 20),
        ("NeuronPrune", 0.5, 20, 40),
        *[("Prune", 0.2, 80, 400)] * 3,
    ]


@pytest.mark.parametrize("scheme", [Prune(0.2), NeuronPrune(0.3)])
def test_a_layer_that_is_nearly_removed_is_named(scheme: Scheme) -> None:
    report = CompressedModel.compress(network(0.01), scheme).report()
    (text,) = report.warnings
    unit = 400 if isinstance(scheme, Prune) else 20
    assert f"next to nothing of 1.weight (1 of {unit})" in text
    assert "0.weight" not in text
    notes = {row.name: row.note for row in report.rows}
    assert notes.pop("1.weight") == f"1 of {unit} left"
    assert set(notes.values()) == {""}
    assert "next to nothing" in str(report)


def test_a_share_below_a_tenth_is_nearly_nothing() -> None:
    def row(kept: int, floor: int) -> PoolRow:
        return PoolRow("Prune", 0.5, (Kept("a", 900, 1000), Kept("b", kept, 1000)), floor)

    assert [bool(row(kept, 1).collapsed) for kept in (0, 49, 50, 51)] == [True, True, False, False]
    assert [bool(row(kept, 200).collapsed) for kept in (200, 201)] == [True, False]
    assert not row(250, 250).collapsed  # half of what was asked


def test_zeros_that_were_there_already_are_told() -> None:
    module = network()
    with torch.no_grad():
        module[0].weight.zero_()
        module[1].weight.zero_()
    (text,) = CompressedModel.compress(module, Prune(0.9)).report().warnings
    assert "asked for a density of 90.00%, and 400 of 1200 are left" in text


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (NeuronPrune(0.5, align=20), "align=20 keeps all 60 groups of 0.weight, .* asks for 30"),
        (NeuronPrune(0.1, align=32, scope="layer"), "keeps all 20 groups of 0.weight, .* for 2"),
    ],
)
def test_an_align_that_keeps_everything_is_refused(scheme: Scheme, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scheme.bind(network())
    NeuronPrune(1.0, align=20).bind(network())  # as asked


def test_more_than_was_asked_is_told() -> None:
    report = CompressedModel.compress(network(), NeuronPrune(0.1, align=8)).report()
    (text,) = report.warnings
    assert "asked for a density of 10.00%, and 24 of 60 are left, 40.00%" in text
    assert CompressedModel.compress(network(), NeuronPrune(0.4, align=8)).report().warnings == ()


class Learner(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = network(0.01)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@pytest.mark.parametrize("callback", [CondensaCallback, DirectCompression])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_training_ends_with_a_warning(callback: type, density: float) -> None:
    quiet = {f"enable_{k}": False for k in ("checkpointing", "progress_bar", "model_summary")}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False,
        callbacks=[callback(NeuronPrune(density))], **quiet,
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.randn(16, 20)), batch_size=2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(Learner(), data)
    told = [str(w.message) for w in seen if "next to nothing" in str(w.message)]
    assert len(told) == (density < 1)
    assert all("layers.1.weight (1 of 20)" in text for text in told)
