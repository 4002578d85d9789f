"""Parameters that are sharded over processes: FSDP2 and tensor parallelism, on two and four."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from launch import run_script
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_condensa.callbacks.checks import check_strategy
from lightning_condensa.deploy import load_compressed

HERE = Path(__file__).parent
FORMS = ["file", "folder"]


@pytest.mark.parametrize(
    "world, extent",
    [
        (2, "quick"),
        pytest.param(4, "quick", marks=pytest.mark.slow),
        pytest.param(2, "all", marks=pytest.mark.slow),
        pytest.param(4, "all", marks=pytest.mark.slow),
    ],
)
def test_sharded_runs_equal_one_process(world: int, extent: str, tmp_path: Path) -> None:
    run_script(HERE / "sharded_worker.py", world, tmp_path, extent)
    for rank in range(world):
        outcome = json.loads((tmp_path / f"{rank}.json").read_text())
        assert outcome
        for case, result in outcome.items():
            assert result == "passed", f"process {rank}, {case}: {result}"


# -- a whole fit -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fits:
    """What some processes, and one alone, have made of the same training."""

    worker: ModuleType
    world: int
    folder: Path

    def outcome(self, form: str, which: str) -> list[dict[str, Any]]:
        texts = (
            (self.folder / form / which / f"rank-{rank}.json").read_text()
            for rank in range(self.world)
        )
        return [json.loads(text) for text in texts]

    def checkpoint(self, form: str, which: str, epoch: int) -> dict[str, Any]:
        """The whole tensors of a checkpoint, and what else it holds."""
        path = self.folder / form / which / f"epoch={epoch}.ckpt"
        if form == "file" or which == "alone":
            return load(path)
        together = self.folder / "together.pt"
        dcp_to_torch_save(path, together)
        return load(together) | load(path / "meta.pt")

    @property
    def kept(self) -> int:
        return round(0.2 * sum(p.numel() for p in self.worker.Net().parameters() if p.dim() > 1))


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@pytest.fixture(
    scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["two", "four"]
)
def fits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fits:
    folder = tmp_path_factory.mktemp("fits")
    path = HERE / "sharded_fit_worker.py"
    run_script(path, request.param, folder)
    spec = importlib.util.spec_from_file_location("sharded_fit_worker", path)
    assert spec is not None and spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    module, _ = worker.fit(folder / "file" / "alone")
    outcome = {"densities": module.densities, "losses": module.losses}
    (folder / "file" / "alone" / "rank-0.json").write_text(json.dumps(outcome))
    return Fits(worker, request.param, folder)


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if t.dim() > 1}


def test_validation_sees_theta(fits: Fits) -> None:
    alone = json.loads((fits.folder / "file" / "alone" / "rank-0.json").read_text())
    total = sum(p.numel() for p in weights(dict(fits.worker.Net().named_parameters())).values())
    for form in FORMS:
        outcomes = fits.outcome(form, "straight")
        first = {"densities": [1.0], "losses": alone["losses"][:1]}  # the sanity check
        for outcome in outcomes:
            assert outcome["densities"][:1] == first["densities"]
            assert outcome["densities"][1:] == [fits.kept / total] * fits.worker.EPOCHS
        # The mean over a batch is the mean over the two parts of it; the sanity check takes two
        # batches of each.
        halves = zip(*(o["losses"] for o in (outcomes[0], outcomes[-1])), strict=True)
        assert [sum(pair) / 2 for pair in halves][1:] == pytest.approx(alone["losses"][1:], 1e-3)


def test_a_fit_equals_one_process(fits: Fits) -> None:
    right = fits.checkpoint("file", "alone", fits.worker.EPOCHS - 1)["state_dict"]
    for form in FORMS:
        ours = fits.checkpoint(form, "straight", fits.worker.EPOCHS - 1)["state_dict"]
        assert ours.keys() == right.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, right[name], rtol=1e-3, atol=1e-4)
            assert torch.equal(tensor != 0, right[name] != 0)


def test_parameters_stay_sharded(fits: Fits) -> None:
    for form in FORMS:
        parts = [o["parts"] for o in fits.outcome(form, "straight")]
        for name, parameter in fits.worker.Net().named_parameters():
            held = [p[name] for p in parts]
            assert max(held) < parameter.numel()
            assert sum(held) >= parameter.numel()


def test_the_best_is_what_is_left(fits: Fits) -> None:
    for form in FORMS:
        best = fits.checkpoint(form, "straight", fits.worker.BEST)["state_dict"]
        for which in ("straight", "resumed"):
            here = fits.folder / form / which
            for rank in range(fits.world):
                state = load(here / f"rank-{rank}.pt")
                assert all(torch.equal(t, best[n]) for n, t in state.items())
            assert sum(int(t.count_nonzero()) for t in weights(state).values()) == fits.kept
            net = load_compressed(here / "model.condensa", fits.worker.Net())
            assert all(torch.equal(t, best[n]) for n, t in net.state_dict().items())
            size = (here / "model.condensa").stat().st_size
            outcomes = fits.outcome(form, which)
            assert [o["size"] for o in outcomes] == [size] * fits.world
            assert "layers.2.weight" in outcomes[0]["report"]


def test_checkpoints_hold_theta_and_resume_bit_for_bit(fits: Fits) -> None:
    def compare(a: object, b: object) -> None:
        if isinstance(a, Tensor):
            assert isinstance(b, Tensor) and torch.equal(a, b)
        elif isinstance(a, dict):
            assert isinstance(b, dict) and a.keys() == b.keys()
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, list):
            assert isinstance(b, list) and len(a) == len(b)
            for ours, theirs in zip(a, b, strict=True):
                compare(ours, theirs)
        else:
            assert a == b

    for form in FORMS:
        last = [fits.checkpoint(form, w, fits.worker.EPOCHS - 1) for w in ("straight", "resumed")]
        for checkpoint in last:
            theta = weights(checkpoint["state_dict"])
            assert sum(int(t.count_nonzero()) for t in theta.values()) == fits.kept
            fits.worker.Net().load_state_dict(checkpoint["state_dict"])
        early = fits.checkpoint(form, "straight", 0)  # at the end both are the same
        assert any(
            not torch.equal(w, early["state_dict"][n])
            for n, w in early["condensa_training_weights"].items()
        )
        for key in ("state_dict", "condensa_training_weights"):
            compare(last[0][key], last[1][key])
        compare(*(c["callbacks"]["CondensaCallback"] for c in last))


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_without_parameters_of_their_own_are_refused(strategy: type) -> None:
    trainer: Any = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(ValueError, match=f"{strategy.__name__} makes flat buffers"):
        check_strategy(trainer)
    for accepted in (ModelParallelStrategy(), pl.strategies.DDPStrategy()):
        trainer.strategy = accepted
        check_strategy(trainer)
