"""Sharded tensors: the same bits as on one process, in groups of two and four processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_condensa


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_tensors_equal_whole_ones(world: int, tmp_path: Path) -> None:
    root = Path(lightning_condensa.__file__).parents[1]
    worker = Path(__file__).with_name("sharded_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(world), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(world):
        outcome = json.loads((tmp_path / f"{rank}.json").read_text())
        assert outcome
        for case, result in outcome.items():
            assert result == "passed", f"process {rank}, {case}: {result}"
