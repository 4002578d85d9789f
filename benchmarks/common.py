"""What every benchmark shares: the record of its environment, result files, means and spreads."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

PACKAGES = (
    "lightning-condensa",
    "torch",
    "pytorch-lightning",
    "botorch",
    "gpytorch",
    "optuna",
    "numpy",
    "condensa",
)


def environment() -> dict[str, Any]:
    """Describe the machine, the package versions and the command line of this process.

    Returns:
        A dictionary that fits into JSON. Versions are those of the installed packages; a
        package that is not installed is left out. Absolute paths on the command line are
        shortened to their last part.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(_short(argument) for argument in sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": _versions(),
    }


def write_results(name: str, payload: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``folder/<name>.json``: the environment, then the payload.

    The file appears whole or not at all: it is written beside its place and renamed.

    Args:
        name: File name without its suffix.
        payload: Anything JSON can hold; a key ``environment`` in it wins over this process's.
        folder: Where to write; made if missing.

    Returns:
        The path of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"environment": environment(), **payload}, indent=2) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)
    return path


def read_results(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read what `write_results` wrote; an empty dictionary where nothing was written yet."""
    path = folder / f"{name}.json"
    if not path.exists():
        return {}
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (0 for a single value).

    Example:
        >>> mean_sd([1.0, 2.0, 3.0])
        (2.0, 1.0)
    """
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread


def _short(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
