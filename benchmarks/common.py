"""What every benchmark shares: the record of its environment, result files, means and spreads."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
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
    "onnxruntime",
    "torch-pruning",
    "mlxtend",
)


def environment() -> dict[str, Any]:
    """Describe the machine, the package versions and the command line of this process.

    Returns:
        A dictionary that fits into JSON. Versions are those of the installed packages; a
        package that is not installed is left out. Absolute paths on the command line are
        shortened to their last part. ``malloc`` holds what is set of glibc's allocator.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([_script(), *(_short(argument) for argument in sys.argv[1:])]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "vnni": has_vnni(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "malloc": {k: v for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")},
        "versions": _versions(),
    }


def has_vnni() -> bool:
    """Whether the processor has 8-bit dot products that do not saturate (x86, on Linux)."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "vnni" in cpuinfo.read_text()


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
    _replace(path, json.dumps({"environment": environment(), **payload}, indent=2))
    return path


def update_results(
    name: str, change: Callable[[dict[str, Any]], None], folder: Path = RESULTS
) -> None:
    """Change ``folder/<name>.json``, which several processes may do at the same time.

    Lists of records are written a record per line.

    Args:
        name: File name without its suffix.
        change: Changes the payload in place; it gets an empty one where there is no file yet.
        folder: Where to write; made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # the folder itself, so that no lock file stays behind
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        payload = read_results(name, folder)
        change(payload)
        parts = (f"{json.dumps(key)}: {_lines(value)}" for key, value in payload.items())
        _replace(folder / f"{name}.json", "{\n" + ",\n".join(parts) + "\n}")
    finally:
        os.close(lock)


def environment_index(results: dict[str, Any]) -> int:
    """The place of this process's environment among those of some results, added if it is new.

    Only the date may be another.
    """
    environments, here = results.setdefault("environments", []), environment()
    for index, other in enumerate(environments):
        if {**other, "date": here["date"]} == here:
            return index
    environments.append(here)
    return len(environments) - 1


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


def silence() -> None:
    """Keep Lightning's start-up messages out of the tables."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")


def _lines(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value, indent=2)
    return "[\n" + ",\n".join(json.dumps(record) for record in value) + "\n]"


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text + "\n")
    Path(file.name).replace(path)


def _script() -> str:
    """This process's script as it is called from the root of the repository."""
    name = Path(sys.argv[0]).name
    return f"benchmarks/{name}" if (Path(__file__).parent / name).exists() else name


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
