"""Groups of weights by what they bear."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from toy import loaders

from lightning_condensa import Choice, Compose, Prune, Quantize, Range, per_group
from lightning_condensa.search import groups_by_sensitivity

#: Densities from which on layers 0 to 5 lose: two that bear little, two more, two everything.
CLIFFS = (0.5, 0.02, 0.001, 0.45, 0.001, 0.025)
PRUNE = Prune(Range(0.01, 1.0, log=True))


class Six(pl.LightningModule):
    """Six layers with cliffs of their own; the metric is logged in validation."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(30, 20) for _ in CLIFFS)
        self.head = nn.BatchNorm1d(20)
        self.sign = sign

    def metric(self) -> float:
        drop = 0.0
        for layer, cliff in zip(self.layers, CLIFFS, strict=True):
            density = float(torch.count_nonzero(layer.weight)) / layer.weight.numel()
            drop += 0.3 * min(max(math.log(cliff / density), 0.0), 1.0)
        return self.sign * (0.95 - drop)

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        self.log("val_acc", self.metric())


def six(sign: float = 1.0) -> Six:
    torch.manual_seed(0)
    return Six(sign)


def members(patterns: list[str], model: nn.Module) -> list[list[int]]:
    """Layers by the group that `per_group` puts them in."""
    found = per_group(PRUNE, model, by=patterns)
    whole = dict.fromkeys(found.space(), 1.0)
    groups = []
    for name in found.space():
        theta = found.at({**whole, name: 0.1}).bind(model).pi(dict(model.named_parameters()))
        groups.append([i for i in range(6) if theta[f"layers.{i}.weight"].nnz < 600])
    return groups


def test_layers_that_bear_as_much_are_a_group_the_most_sensitive_first() -> None:
    model = six()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = groups_by_sensitivity(PRUNE, model, Six.metric, groups=3)
    assert members(found, model) == [[0, 3], [1, 5], [2, 4]]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    two = groups_by_sensitivity(PRUNE, model, Six.metric, groups=2)
    assert members(two, model) == [[0, 3], [1, 2, 4, 5]]


def test_a_metric_by_name_and_one_that_falls() -> None:
    val = loaders()["val_dataloaders"]
    cpu = {"accelerator": "cpu"}
    named = groups_by_sensitivity(PRUNE, six(), "val_acc", val, groups=3, trainer=cpu)
    assert named == groups_by_sensitivity(PRUNE, six(), Six.metric, groups=3)
    fallen = groups_by_sensitivity(PRUNE, six(-1.0), Six.metric, groups=3, mode="min")
    assert fallen == named


def test_fewer_groups_where_layers_do_not_differ_and_nan_is_a_loss() -> None:
    assert len(groups_by_sensitivity(PRUNE, six(), lambda m: 0.9)) == 1

    def broken(module: Six) -> float:
        return math.nan if int((module.layers[2].weight == 0).sum()) > 300 else 0.9

    found = groups_by_sensitivity(PRUNE, six(), broken)
    assert members(found, six()) == [[2], [0, 1, 3, 4, 5]]


def test_all_dimensions_of_a_composition_go_together() -> None:
    scheme = Compose([PRUNE, Quantize(Choice(["float16", "int8"]))])
    found = groups_by_sensitivity(scheme, six(), Six.metric, groups=3)
    assert found == groups_by_sensitivity(PRUNE, six(), Six.metric, groups=3)
    assert len(per_group(scheme, six(), by=found).space()) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 0}, "groups must be an int >= 1, got 0"),
        ({"mode": "best"}, "mode must be"),
        ({"loss": 0}, "loss must be a finite number > 0"),
        ({"metric": "val_acc"}, "needs val_dataloaders or a datamodule"),
        ({"scheme": Prune(0.5)}, "no Range or Choice"),
        (
            {"scheme": Compose([PRUNE, Quantize(Choice(["int8", "int4"]), include=["0"])])},
            "selects other weights than",
        ),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {"scheme": PRUNE, "model": six(), "metric": Six.metric, **changes}
    with pytest.raises(ValueError, match=message):
        groups_by_sensitivity(**given)
