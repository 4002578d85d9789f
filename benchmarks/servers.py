"""A database server of our own, for as long as it is needed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def postgres_folder() -> Path | None:
    """Where PostgreSQL's programs are; ``None`` where they are not."""
    found = shutil.which("pg_ctl")
    if found is not None:
        return Path(found).parent
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    return debian[-1].parent if debian else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Run a PostgreSQL server that listens on a socket in a temporary folder.

    Yields:
        Its address, for SQLAlchemy with psycopg.

    Raises:
        FileNotFoundError: If PostgreSQL is not installed.
    """
    programs = postgres_folder()
    if programs is None:
        raise FileNotFoundError("PostgreSQL is not installed: no pg_ctl")
    folder = Path(tempfile.mkdtemp(prefix="condensa-pg-"))
    # The server refuses to run as root.
    user = "postgres" if os.getuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user)

    def call(*command: str) -> None:
        subprocess.run(
            command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, timeout=120
        )

    data = str(folder / "data")
    try:
        call(str(programs / "initdb"), "-D", data, "-U", "condensa", "-A", "trust", "-N")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        control = str(programs / "pg_ctl")
        call(control, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql+psycopg://condensa@/postgres?host={folder}"
        finally:
            call(control, "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
