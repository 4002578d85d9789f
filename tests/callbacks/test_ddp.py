from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_condensa


@pytest.mark.timeout(180)
def test_two_processes_end_with_the_same_bits(tmp_path: Path) -> None:
    root = Path(lightning_condensa.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    worker = Path(__file__).with_name("ddp_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("last", "best"):
        first, second = (
            torch.load(tmp_path / f"{name}-rank{rank}.pt", weights_only=True) for rank in (0, 1)
        )
        assert all(torch.equal(first[n], second[n]) for n in first)
        kept = sum(int(t.count_nonzero()) for n, t in first.items() if t.dim() > 1)
        assert kept == round(0.2 * (8 * 16 + 16 * 3))
    third = torch.load(tmp_path / "best-epoch=2.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(first[n], third[n]) for n in third)  # `first` is the best here
