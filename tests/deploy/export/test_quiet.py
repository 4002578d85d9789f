from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_condensa import CompressedModel, Prune
from lightning_condensa.deploy.export.quiet import quiet_export


def test_export_says_nothing_of_torchvision(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compressed = CompressedModel.compress(nn.Linear(4, 3), Prune(0.5))
    with caplog.at_level(logging.DEBUG):
        compressed.to_onnx(tmp_path / "m.onnx", torch.zeros(1, 4))
    assert "torchvision is not installed" not in caplog.text


def test_only_that_message_is_dropped_and_only_within(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    with pytest.raises(KeyError), quiet_export():
        logger.warning("torchvision is not installed. Skipping %s", "nms")
        logger.warning("something else")
        raise KeyError
    logger.warning("torchvision is not installed. Skipping %s", "roi_align")
    assert [r.getMessage() for r in caplog.records] == [
        "something else",
        "torchvision is not installed. Skipping roi_align",
    ]
    assert logger.filters == []
