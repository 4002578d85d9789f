"""The command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launch import run_script
from torch import nn

from lightning_condensa import Compose, CompressedModel, Prune, Quantize, cli
from lightning_condensa.cli import main
from lightning_condensa.version import __version__


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model.condensa"
    model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2))
    scheme = Compose([Prune(0.25), Quantize("int8")])
    CompressedModel.compress(model, scheme).save(path)
    return path


def test_inspect_shows_every_tensor_and_the_size(file: Path) -> None:
    out = run_script(Path(cli.__file__), "inspect", file)
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows["0.weight"][1] == "10x20" and rows["0.weight"][3] == "I8"
    kept = int(rows["0.weight"][5]) + int(rows["2.weight"][5])
    assert kept == round(0.25 * 220)
    assert f"{file.stat().st_size:,} bytes" in out


@pytest.mark.slow
def test_the_module_is_a_command(file: Path) -> None:
    command = [sys.executable, "-m", "lightning_condensa.cli", "inspect", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{file.stat().st_size:,} bytes" in done.stdout


@pytest.mark.parametrize("content", [None, b"", b"no packed file"])
def test_inspect_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "other.condensa"
    if content is not None:
        path.write_bytes(content)
    assert main(["inspect", str(path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "other.condensa" in shown.err


def test_unknown_commands_show_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["explode"])
    assert "usage: lightning-condensa" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__
