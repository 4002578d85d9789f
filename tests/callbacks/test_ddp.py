from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from launch import run_script
from torch import Tensor

WORKER = Path(__file__).with_name("ddp_worker.py")


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.timeout(180)
def test_two_processes_end_with_the_same_bits(tmp_path: Path) -> None:
    run_script(WORKER, "monitor", tmp_path)
    for name in ("last", "best"):
        first, second = (
            torch.load(tmp_path / f"{name}-rank{rank}.pt", weights_only=True) for rank in (0, 1)
        )
        assert_equal(first, second)
        kept = sum(int(t.count_nonzero()) for n, t in first.items() if t.dim() > 1)
        assert kept == round(0.2 * (8 * 16 + 16 * 3))
    third = torch.load(tmp_path / "best-epoch=2.ckpt", weights_only=True)["state_dict"]
    assert_equal(first, {n: third[n] for n in first})  # `first` is the best here


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one, two and four processes end with."""
    folder = tmp_path_factory.mktemp("worlds")
    run_script(WORKER, "worlds", folder)
    return folder


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("scheme", ["p", "p+int8"])
def test_more_processes_end_with_the_same_theta_on_every_rank(
    compared: Path, scheme: str, world: int
) -> None:
    ranks = [
        torch.load(compared / f"{scheme}-{world}-rank{rank}.pt", weights_only=True)
        for rank in range(world)
    ]
    for other in ranks[1:]:
        for part in ("codes", "module"):
            assert_equal(ranks[0][part], other[part])
    codes = ranks[0]["codes"]
    numel = sum(t.numel() for t in codes.values())
    assert sum(int(t.count_nonzero()) for t in codes.values()) == round(0.15 * numel)
    assert {t.dtype for t in codes.values()} == {torch.int8 if "int8" in scheme else torch.float32}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("scheme", ["p", "p+int8"])
def test_more_processes_learn_as_much_as_one(compared: Path, scheme: str, world: int) -> None:
    accuracy = json.loads((compared / "accuracy.json").read_text())
    one = accuracy[f"{scheme}-1"]
    assert one > 0.9
    assert abs(accuracy[f"{scheme}-{world}"] - one) < 0.03
