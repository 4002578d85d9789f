"""The callbacks in the YAML of a LightningCLI."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_condensa import (
    Compose,
    CondensaCallback,
    DirectCompression,
    MaskedFineTune,
    Prune,
    Quantize,
)
from lightning_condensa.lc import LCSchedule, PaperSchedule

cli = pytest.importorskip("pytorch_lightning.cli")
pytest.importorskip("jsonargparse")

HEADER = """
trainer:
  max_epochs: 2
  logger: false
  accelerator: cpu
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
"""

DEFAULT = """
    - class_path: lightning_condensa.CondensaCallback
      init_args:
        scheme:
          class_path: lightning_condensa.Compose
          init_args:
            schemes:
              - class_path: lightning_condensa.Prune
                init_args:
                  density: 0.1
                  scope: layer
                  exclude: [layers.3]
                  overrides: {layers.0: 0.2}
              - class_path: lightning_condensa.Quantize
                init_args: {dtype: int8}
        schedule: {l_steps: 7}
        monitor: val_acc
    - class_path: lightning_condensa.MaskedFineTune
      init_args: {biases: false}
"""

PAPER = """
    - class_path: lightning_condensa.CondensaCallback
      init_args:
        scheme: {class_path: lightning_condensa.Prune, init_args: {density: 0.125}}
        preset: paper
        schedule:
          class_path: lightning_condensa.lc.PaperSchedule
          init_args: {steps: 4, lr: 0.1, lr_schedule: [1, 2], lr_multiplier: 0.5}
"""

DIRECT = """
    - class_path: lightning_condensa.DirectCompression
      init_args:
        scheme: {class_path: lightning_condensa.Quantize}
"""


@pytest.fixture
def from_yaml(net_class, tmp_path: Path):  # type: ignore[no-untyped-def]
    def build(callbacks: str):  # type: ignore[no-untyped-def]
        file = tmp_path / "config.yaml"
        file.write_text(HEADER + callbacks)
        arguments = ["--config", str(file)]
        return cli.LightningCLI(net_class, run=False, args=arguments, save_config_callback=None)

    return build


def test_the_default(from_yaml) -> None:  # type: ignore[no-untyped-def]
    callback, masked = from_yaml(DEFAULT).trainer.callbacks[:2]
    prune = Prune(0.1, scope="layer", exclude="layers.3", overrides={"layers.0": 0.2})
    assert isinstance(callback, CondensaCallback)
    assert callback.scheme == Compose([prune, Quantize("int8")])
    assert callback.schedule == LCSchedule(l_steps=7)
    assert callback.monitor == "val_acc"
    assert isinstance(masked, MaskedFineTune) and not masked.biases


def test_a_whole_schedule_and_a_run(from_yaml, loader, density) -> None:  # type: ignore[no-untyped-def]
    made = from_yaml(PAPER)
    callback = made.trainer.callbacks[0]
    expected = PaperSchedule(steps=4, lr=0.1, lr_schedule=[1, 2], lr_multiplier=0.5)
    assert callback.schedule == expected
    made.trainer.fit(made.model, loader)
    assert density(made.model) == 0.125


def test_direct_compression(from_yaml) -> None:  # type: ignore[no-untyped-def]
    callback = from_yaml(DIRECT).trainer.callbacks[0]
    assert isinstance(callback, DirectCompression)
    assert callback.scheme == Quantize()


def test_what_yaml_may_get_wrong() -> None:
    with pytest.raises(ValueError, match="is not a scheme"):
        CondensaCallback({"class_path": "torch.nn.Linear", "init_args": {}})
    with pytest.raises(ValueError, match="density"):
        DirectCompression({"class_path": "Prune", "init_args": {"density": 2}})
