"""Compile the bundled kernel once for this machine, and load it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("kernel.c")
_FLAGS = ("-O3", "-std=gnu11", "-fno-tree-loop-distribute-patterns", "-fPIC", "-shared")
#: From the fastest to what every compiler takes.
_OPTIONS = (("-march=native", "-fopenmp"), ("-march=native",), ())
_SECONDS = 60


class KernelUnavailableError(RuntimeError):
    """The kernel can't be compiled or loaded here; the message says why."""


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled kernel, from the user's cache where it is there.

    It is compiled with ``$CC``, ``cc`` or ``gcc`` into ``$XDG_CACHE_HOME/lightning-condensa`` (or
    ``~/.cache``), under a name that changes with the source, the compiler and the CPU. With
    OpenMP it runs in the threads that torch has started already: torch loads its OpenMP library
    for everyone.

    Raises:
        KernelUnavailableError: If there is no compiler, it fails, or the cache can't be written.
    """
    compiler = _compiler()
    try:
        path = _cache() / f"sparse-{_key(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelUnavailableError(f"the sparse kernel can't be built: {error}") from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.sparse_scratch.argtypes, library.sparse_scratch.restype = [pointer], integer
    library.sparse_block.argtypes, library.sparse_block.restype = [pointer, integer], integer
    library.sparse_group.argtypes, library.sparse_group.restype = [pointer, integer], integer
    library.sparse_run.argtypes = [*3 * [pointer], *2 * [integer], pointer, *2 * [integer]]
    library.sparse_run.restype = None
    return library


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise KernelUnavailableError("there is no C compiler: neither $CC nor cc nor gcc is found")


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "lightning-condensa"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_SECONDS)
    parts = (_SOURCE.read_bytes(), version.stdout, repr((_FLAGS, _OPTIONS)).encode(), _cpu())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> bytes:
    """What ``-march=native`` depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_bytes().splitlines() if cpuinfo.exists() else []
    kinds = (b"model name", b"flags", b"Features", b"CPU part")
    described = sorted({line for line in lines if line.startswith(kinds)})
    return b"\n".join([platform.machine().encode(), platform.processor().encode(), *described])


def _compile(compiler: str, path: Path) -> None:
    """Write the library whole or not at all: two processes may do so at the same time."""
    failure = ""
    for options in _OPTIONS:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [compiler, *_FLAGS, *options, "-o", str(built), str(_SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
            if done.returncode == 0:
                built.replace(path)
                return
            failure = done.stderr
    raise KernelUnavailableError(f"{compiler} fails on the sparse kernel: {failure.strip()[-500:]}")
