"""Sharded tensors: the same bits as on one process, in groups of two and four processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch import run_script


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_tensors_equal_whole_ones(world: int, tmp_path: Path) -> None:
    run_script(Path(__file__).with_name("sharded_worker.py"), world, tmp_path)
    for rank in range(world):
        outcome = json.loads((tmp_path / f"{rank}.json").read_text())
        assert outcome
        for case, result in outcome.items():
            assert result == "passed", f"process {rank}, {case}: {result}"
