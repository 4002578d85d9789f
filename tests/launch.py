"""Processes that start in milliseconds: forked from one that has imported the package.

Importing PyTorch Lightning takes seconds of CPU. Tests that are about what processes do, and not
about how they start, need not pay for it in each of them.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory


@cache
def prepared() -> ForkServerContext:
    """Starts processes that have imported the package; from one server in a session."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["lightning_condensa"])
    return context


def run_script(script: Path, *arguments: object, cwd: Path | None = None) -> str:
    """Do what ``python SCRIPT ARGUMENTS`` does, and return what it prints.

    Raises:
        AssertionError: If it fails, with the end of its standard error.
    """
    paths = os.pathsep.join(path for path in sys.path if path)  # for processes that it starts
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    line = [str(script), *map(str, arguments)]
    with TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        process = prepared().Process(target=_run, args=(line, environment, cwd, printed))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
        out, errors = (path.read_text() for path in printed)
    assert process.exitcode == 0, f"{line} ended with {process.exitcode}: {errors[-3000:]}"
    return out


def _run(
    line: list[str], environment: Mapping[str, str], cwd: Path | None, printed: list[Path]
) -> None:
    for descriptor, path in zip((1, 2), printed, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = line
    sys.path.insert(0, str(Path(line[0]).parent))
    runpy.run_path(line[0], run_name="__main__")
