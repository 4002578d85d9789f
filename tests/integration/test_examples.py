"""The examples as a user runs them, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch import run_script
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.timeout(900)
def test_the_main_job_in_small(tmp_path: Path) -> None:
    # Hardly trained networks: a wide tolerance, so that something is feasible.
    small = ("--trials", "2", "--epochs", "4", "--tolerance", "0.9", "--confidence", "0.5")
    out = run_script(EXAMPLES / "digits/search.py", *small, cwd=tmp_path)
    folder = tmp_path / "runs" / "digits"
    figures = json.loads((folder / "figures.json").read_text())
    dense, compressed = figures["dense"], figures["compressed"]
    assert dense["test accuracy"] >= 0.98
    assert dense["bytes on disk"] == (folder / "dense.safetensors").stat().st_size
    packed = folder / "result" / "best.condensa"
    assert compressed["bytes on disk"] == packed.stat().st_size < dense["bytes on disk"] / 5
    assert "equal, bit for" in out and "tensorboard --logdir" in out
    assert (folder / "result" / "search.png").exists()
    assert load_file(folder / "outputs.safetensors")["outputs"].shape == (400, 10)
    # A second run finds everything done.
    again = run_script(EXAMPLES / "digits/search.py", *small, cwd=tmp_path)
    assert again.count("feasible") == out.count("feasible")
    assert len(list((folder / "trials").iterdir())) == 2


@pytest.mark.slow
def test_every_layer_in_its_own_way(tmp_path: Path) -> None:
    out = run_script(EXAMPLES / "mixed_scheme/compress.py", "--epochs", "3", cwd=tmp_path)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    table = [cells for cells in lines if len(cells) == 8 and cells[4]]
    bits = {name: int(bits) for name, _, _, _, bits, *_ in table}
    weights = {f"layers.{i}.weight": b for i, b in {0: 8, 2: 4, 6: 4, 8: 8}.items()}
    assert bits.items() >= weights.items()
    kept = {name: int(nnz.replace(",", "")) for name, _, nnz, *_ in table}
    # Whole filters and blocks of 16, of which some values are rounded to zero.
    assert kept["layers.0.bias"] + kept["layers.2.bias"] == 48
    assert 0.8 * 819 * 16 < kept["layers.6.weight"] <= 819 * 16
    assert "48 of 96 kept" in out and "819 of 8,192 kept" in out
    size = int(out.split("dense, ")[-1].split()[0].replace(",", ""))
    assert size == (tmp_path / "mixed.condensa").stat().st_size < 20_000
    # The output that is shown is of this scheme.
    shown = (ROOT / "examples" / "mixed_scheme" / "output.txt").read_text()
    for line in ("FilterPrune: 50.00% asked", "BlockPrune: 10.00% asked", "layers.8.weight"):
        assert line in shown and line in out


@pytest.mark.slow
def test_the_callback_in_a_script(tmp_path: Path) -> None:
    out = run_script(EXAMPLES / "digits/callback.py", cwd=tmp_path)
    assert "layers.6.weight" in out and "bytes in digits.condensa" in out
    assert (tmp_path / "digits.condensa").stat().st_size < 20_000
