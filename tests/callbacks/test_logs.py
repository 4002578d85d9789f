from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_condensa import Compose, CondensaCallback, Prune, Quantize

L_STEPS = 6


def events_of(folder: str) -> EventAccumulator:
    events = EventAccumulator(folder)
    events.Reload()
    return events


@pytest.fixture
def logged(net, trainer, loader, tmp_path) -> EventAccumulator:  # type: ignore[no-untyped-def]
    logger = TensorBoardLogger(tmp_path)
    scheme = Compose([Prune(0.25), Quantize("float16")])
    callback = CondensaCallback(scheme, schedule={"l_steps": L_STEPS}, monitor="val_acc")
    # Far fewer steps than log_every_n_steps between C-steps: none may be dropped.
    trainer(callback, max_epochs=5, logger=logger, log_every_n_steps=50).fit(net(), loader, loader)
    return events_of(logger.log_dir)


def test_tensorboard_scalars(logged: EventAccumulator) -> None:
    tags = set(logged.Tags()["scalars"])
    series = {
        name: [(e.step, e.value) for e in logged.Scalars(f"condensa/{name}")]
        for name in ("density", "rate", "gap", "value_bytes", "c_step_seconds")
    }
    schedule = CondensaCallback(Prune(0.25), schedule={"l_steps": L_STEPS}).schedule
    plan = schedule.plan(30, prunes=True, projects=True)
    for values in series.values():
        assert [step for step, _ in values] == list(plan.c_steps)
        assert all(math.isfinite(v) for _, v in values)
    densities = [v for _, v in series["density"]]
    assert densities[0] > 0.9
    assert densities[-1] == pytest.approx(0.25)
    assert densities == sorted(densities, reverse=True)
    rates = [v for _, v in series["rate"]]
    assert rates == pytest.approx(plan.strength)
    assert rates == sorted(rates)
    assert "condensa/mu" not in tags  # that of the paper's schedule
    for layer in ("layers.0.weight", "layers.3.weight"):
        (event,) = logged.Scalars(f"condensa/layer_density/{layer}")
        assert 0 < event.value <= 1
    assert logged.Scalars("condensa/final_density")[-1].value == pytest.approx(0.25)
    assert logged.Scalars("condensa/final_value_bytes")[-1].value > 44 * 2


def test_the_papers_schedule_logs_mu(net, trainer, loader, tmp_path) -> None:  # type: ignore[no-untyped-def]
    logger = TensorBoardLogger(tmp_path)
    callback = CondensaCallback(Prune(0.25), "paper", schedule={"steps": 6})
    trainer(callback, max_epochs=5, logger=logger).fit(net(), loader)
    events = events_of(logger.log_dir)
    assert [e.value for e in events.Scalars("condensa/mu")] == pytest.approx(
        callback.schedule.plan(30).strength
    )
    ratios = [e.value for e in events.Scalars("condensa/penalty_to_loss_gradient")]
    assert len(ratios) == 5  # none at the first C-step
    assert ratios[-1] > 0
    assert "condensa/rate" not in events.Tags()["scalars"]


def test_tensorboard_hparams(logged: EventAccumulator) -> None:
    content = logged.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"Prune.density" in content
    assert b"Quantize.dtype" in content
    # the first word of a field that only the experiment summary has: the metrics shown
    experiment = logged.summary_metadata["_hparams_/experiment"].plugin_data.content
    for metric in (b"condensa/final_density", b"condensa/final_value_bytes", b"val_acc"):
        assert metric in experiment


def test_every_logger_gets_the_scalars(net, trainer, loader, tmp_path) -> None:  # type: ignore[no-untyped-def]
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")]
    callback = CondensaCallback(Prune(0.25), schedule={"l_steps": L_STEPS})
    trainer(callback, max_epochs=3, logger=loggers).fit(net(), loader)
    header = (Path(loggers[0].log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "condensa/density" in header
    assert "condensa/layer_density/layers.0.weight" in header
    assert "condensa/density" in events_of(loggers[1].log_dir).Tags()["scalars"]


def test_progress_bars_show_density_and_gap(net, trainer, loader) -> None:  # type: ignore[no-untyped-def]
    shown: list[dict[str, Any]] = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
            shown.append(dict(trainer.progress_bar_metrics))

    scheme = Compose([Prune(0.25), Quantize("int8")])
    callback = CondensaCallback(scheme, schedule={"l_steps": L_STEPS})
    trainer(callback, Look(), max_epochs=4).fit(net(), loader)
    assert shown[-1]["density"] == pytest.approx(0.25, abs=0.03)  # some round to zero
    assert shown[-1]["gap"] > 0


@pytest.mark.parametrize("bar", [pl.callbacks.RichProgressBar, pl.callbacks.TQDMProgressBar])
def test_both_progress_bars_run(net, trainer, loader, bar, capsys) -> None:  # type: ignore[no-untyped-def]
    callback = CondensaCallback(Prune(0.25), schedule={"l_steps": L_STEPS})
    trainer(callback, bar(), max_epochs=2, enable_progress_bar=True).fit(net(), loader)
    captured = capsys.readouterr()
    assert "density" in captured.out + captured.err
